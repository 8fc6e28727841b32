"""Rates as people write them."""

from typing import Any


def parse_rate(text: str) -> float:
    """Reads a share of the cost, as `0.5` or `50%`.

    Raises:
        ValueError: The text is no number.
    """
    text = text.strip()
    return round(float(text[:-1]) / 100, 12) if text.endswith("%") else float(text)


def format_rate(rate: float) -> str:
    """A rate as tables and folders have it: with two decimals, or with all that it needs."""
    short = f"{rate:.2f}"
    return short if abs(float(short) - rate) < 5e-7 else f"{rate:.6f}".rstrip("0")


def read_rate(value: Any) -> Any:
    """A value of a YAML file with texts such as `50%` as numbers; others stay for the check."""
    if isinstance(value, str) and value.strip().endswith("%"):
        try:
            return parse_rate(value)
        except ValueError:
            return value
    return value
