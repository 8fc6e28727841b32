import math

import pytest

from cacp_ray.reporting.summary import (
    DASH,
    accuracy_columns,
    format_macs,
    format_number,
    format_seconds,
    sentence,
    short_columns,
    size_columns,
    standard_errors,
    summary_rows,
    words,
)
from tests.unit.reporting.synthetic import make_own_result, make_result


def cells(result: dict, columns: list) -> dict[str, dict[tuple[str, str], str]]:
    return {
        row["label"]: {(c.head, c.unit): c.text(row) for c in columns}
        for row in summary_rows(result)
    }


def test_the_base_network_comes_first_and_rates_rise():
    labels = [row["label"] for row in summary_rows(make_result((0.7, 0.3, 0.5)))]
    assert labels == ["base", "0.30", "0.50", "0.70"]


def test_units_fit_the_base_network_and_hold_for_all_rows():
    small = cells(make_result(), size_columns(make_result()))
    assert small["base"][("MACs", "M")] == "40.00"
    assert small["0.30"][("MACs", "M")] == "12.00"
    assert small["0.30"][("params", "k")] == "81.6"
    result = make_result()
    result["base"] |= {"macs": 4_089_000_000, "params": 25_557_032}
    large = cells(result, size_columns(result))
    assert large["base"][("MACs", "G")] == "4.089"
    assert large["base"][("params", "M")] == "25.56"


def test_cost_kept_names_the_cost_that_the_rate_limits():
    result = make_result() | {"cost": "params"}
    assert cells(result, size_columns(result))["0.30"][("cost kept", "% of params")] == "29.98"


def test_accuracies_are_percent_and_changes_are_points():
    table = cells(make_result(), accuracy_columns(make_result()))
    result = make_result()["rates"][0]
    for column, key in (
        (("uniform", "scored"), "uniform_score"),
        (("policy", "scored"), "policy_score"),
        (("search", "scored"), "search_score"),
        (("policy", "final"), "policy_recovered_score"),
        (("search", "final"), "search_recovered_score"),
        (("winner", "final"), "score"),
        (("tuned", "on search"), "finetuned_score"),
        (("tuned", "on test"), "test_score"),
    ):
        assert table["0.30"][column] == f"{100 * result[key]:.2f}"
    change = 100 * (result["test_score"] - 0.91)
    assert table["0.30"][("change", "on test")] == f"\N{MINUS SIGN}{-change:.2f}"


def test_missing_values_are_dashes():
    result = make_result(is_finetuned=False)
    result["rates"][0]["latency_ms"] = None
    del result["rates"][0]["speedup"]
    table = cells(result, [*size_columns(result), *accuracy_columns(result)])["0.30"]
    for head in (
        ("ms for", "1 image"),
        ("speed-up", "1 image"),
        ("tuned", "on search"),
        ("tuned", "on test"),
        ("change", "on test"),
    ):
        assert table[head] == DASH
    assert format_number(math.nan, 2) == DASH


def test_without_latency_no_column_of_speed():
    result = make_result()
    assert {"ms for", "speed-up"} <= {column.head for column in size_columns(result)}
    assert "speed-up" in {column.head for column in short_columns(result)}
    del result["base"]["latency_ms"]
    heads = {column.head for column in size_columns(result) + short_columns(result)}
    assert not {"ms for", "speed-up"} & heads
    assert {"rate", "params", "top-1"} <= heads


def test_what_no_rate_has_has_no_column_and_no_word():
    result = make_result()
    for row in result["rates"]:
        row["policy_score"] = None
        del row["policy_recovered_score"], row["uniform_score"]
    heads = [(column.head, column.unit) for column in accuracy_columns(result)]
    assert heads[:2] == [("search", "scored"), ("winner", "final")]
    assert "policy" not in " ".join(map(str, words(result)))
    for row in result["rates"]:
        del row["search_score"]  # as runs of earlier versions
    heads = [(column.head, column.unit) for column in accuracy_columns(result)]
    assert heads[:1] == [("winner", "final")]


@pytest.mark.parametrize("has_policy", [True, False])
def test_every_word_in_the_heads_is_explained_once(has_policy):
    result = make_result()
    if not has_policy:
        for row in result["rates"]:
            row["policy_score"] = row["policy_recovered_score"] = row["uniform_score"] = None
    explained = [word for word, _ in words(result)]
    plain = {"on search", "on test"}
    used = {text for c in accuracy_columns(result) for text in (c.head, c.unit)} - plain
    assert sorted(explained) == sorted(used)


def test_standard_errors_are_binomial():
    result = make_result((0.5,))
    result["base"]["search"] = {"score": 0.5, "images": 2500}
    recovered = dict.fromkeys(
        (
            "uniform_score",
            "policy_score",
            "search_score",
            "policy_recovered_score",
            "search_recovered_score",
            "score",
        ),
        0.9,
    )
    result["rates"][0] |= recovered | {"uniform_score": 0.5, "finetuned_score": None}
    result["base"]["test"] = {"score": 0.5, "images": 10_000}
    result["rates"][0]["test_score"] = 0.5
    assert standard_errors(result) == [
        "search split: 0.60 to 1.00 points (2,500 images)",
        "test split: 0.50 points (10,000 images)",
    ]


def test_a_split_that_was_not_measured_has_no_standard_error():
    result = make_result(is_finetuned=False)
    result["base"]["test"] = None
    assert [text.split(":")[0] for text in standard_errors(result)] == ["search split"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, DASH),
        (0.0, "0.0 s"),
        (4.21, "4.2 s"),
        (59.7, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.6, "1 h 00 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_are_read_at_a_glance(seconds, text):
    assert format_seconds(seconds) == text


def test_macs_carry_their_unit():
    assert format_macs(40_551_424) == "40.55 M"
    assert format_macs(4_089_184_256) == "4.089 G"


def test_the_words_say_when_final_subnets_were_repaired_in_another_way():
    result = make_result((0.5,))
    assert "layer by layer" not in dict(words(result))["final"]
    result["rates"][0]["sequential"] = True
    assert "layer by layer" in dict(words(result))["final"]


def test_a_search_on_part_of_the_split_is_said_and_has_no_standard_error_of_the_whole():
    result = make_result()
    result["rates"][0] |= {"search_score": 0.5, "search_images": 5000}
    whole = standard_errors(result)
    assert "images" not in dict(words(result))["search"]
    result["rates"][0]["search_images"] = 300
    assert "on 300 images" in dict(words(result))["search"]
    assert standard_errors(result) != whole


def test_a_sentence_begins_with_a_capital_and_names_keep_their_letters():
    names = ("top-1", "PSNR (dB)", "mIoU", "")
    assert [sentence(name) for name in names] == ["Top-1", "PSNR (dB)", "MIoU", ""]


def test_heads_of_a_task_speak_of_examples():
    heads = [
        [column.unit for column in size_columns(result)[-3:]]
        for result in (make_result(), make_own_result())
    ]
    assert heads[0] == ["1 image", "1 image", "64 images"]
    assert heads[1] == ["1 example", "1 example", "64 examples"]
