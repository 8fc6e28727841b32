"""Rates as people write and read them."""

import pytest

from cacp_ray.io.rates import format_rate, parse_rate


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.50"), (0.42, "0.42"), (1.0, "1.00"), (0.125, "0.125"), (0.3333, "0.3333"),
     (0.1 + 0.2, "0.30"), (1 / 3, "0.333333"), (0.001, "0.001")],
)  # fmt: skip
def test_a_rate_has_two_decimals_and_more_where_it_needs_them(rate, text):
    assert format_rate(rate) == text
    assert float(text) == pytest.approx(rate, abs=1e-6)


@pytest.mark.parametrize(("text", "rate"), [("0.5", 0.5), ("50%", 0.5), (" 12.5 % ", 0.125)])
def test_a_share_may_be_written_in_per_cent(text, rate):
    assert parse_rate(text) == rate
