"""No table is wider than 80 columns, wraps a head, or cuts a cell."""

import copy
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from cacp_ray.evaluation.measurement import TOP1, Metric, Scored
from cacp_ray.reporting.comparison_table import comparison_table
from cacp_ray.reporting.displays import finetune_panel, search_panel, tuning_panel
from cacp_ray.reporting.stacks import Stack
from cacp_ray.reporting.summary import Column
from cacp_ray.reporting.tables import (
    answers_table,
    benchmark_table,
    final_table,
    frontier_table,
    measured_table,
    stages_table,
)
from cacp_ray.reporting.tuning import tuning_header, tuning_rows, tuning_table
from tests.unit.reporting.synthetic import make_own_result, make_result
from tests.unit.reporting.test_benchmark import CONTENT, timed
from tests.unit.reporting.test_comparison import FOURTEEN, make_comparison, make_run
from tests.unit.reporting.test_displays import BEST, EPOCH, STATE, make_trial

WIDTH = 80
TIMES_ROW = r"\d+\.\d\d\N{MULTIPLICATION SIGN}"


def render(content, width: int = WIDTH) -> str:
    file = io.StringIO()
    Console(file=file, width=width, no_color=True).print(content)
    text = file.getvalue()
    assert max(map(len, text.splitlines()), default=0) <= width
    return text


def check(stack: Stack) -> str:
    """Every head and every cell stands whole in a line of its table."""
    text = render(stack)
    columns = [*stack.names, *(column for block in stack.blocks for column in block)]
    lines = text.splitlines()
    for column in columns:
        for words in (column.head, column.unit, *(column.text(row) for row in stack.rows)):
            assert any(words in line for line in lines), words
    rules = [line for line in lines if line.startswith("\N{BOX DRAWINGS LIGHT HORIZONTAL}")]
    heads = 2 if any(column.unit for column in columns) else 1
    empty = sum(not line.strip() for line in lines)
    title = 1 if stack.title else 0
    assert len(lines) <= title + empty + len(rules) * (heads + 1 + len(stack.rows))  # none wrapped
    return text


def make_tuning(num_settings: int) -> dict:
    start = {f"agent.a_setting_of_number_{i}": 10.0**-i for i in range(num_settings)}
    return {
        "name": "tuning", "start": start, "metric": {"name": "top-1", "is_share": True},
        "trials": [
            {
                "name": f"trial-{i}", "settings": {key: v * (i + 1) for key, v in start.items()},
                "evaluations": 12_345, "score": 0.81, "area": 0.75, "known": 0.5, "since": 0,
            }
            for i in range(12)
        ],
    }  # fmt: skip


RATES = tuple(round(0.08 * i, 2) for i in range(1, 13))
LARGE = make_result(RATES)
LARGE["base"] |= {"macs": 15_470_264_320, "params": 138_357_544, "latency_ms": 12345.67}
PREDICTED = make_result() | {"latency_table": {"device": "cpu"}, "cost": "macs and latency"}
THREE_BATCHES = copy.deepcopy(CONTENT)
for each in THREE_BATCHES["rows"]:
    each["format"] = "openvino-int8"
    each["latency"].append(timed(1024, 12345.6, 10.25))
ANSWER = {
    "rate": 0.5, "cost_kept": 0.499, "macs": 19_960_000, "policy_score": 0.8, "scored_score": 0.82,
    "score": 0.85, "path": "subnets/rate-0.50",
}  # fmt: skip
DEEP = Path("runs/a-rather-long-name/subnets")
SUBNETS = [
    (DEEP / f"rate-{r:.2f}", r, Scored(score=0.9, figures={"top1": 0.9}, images=50_000), TOP1)
    for r in RATES
]
PSNR = Metric("PSNR (dB)")
OWN = [
    (DEEP / "rate-0.50", 0.5, Scored(score=30.123, figures={"SSIM": 0.91, "LPIPS": 0.123}), PSNR)
]

STACKS = {
    "stages": stages_table(make_result()),
    "stages of a task": stages_table(make_own_result()),
    "frontier": frontier_table(LARGE),
    "answers": answers_table("Subnets from the policy", make_result(), [ANSWER]),
    "measured": measured_table("test", SUBNETS),
    "measured by a task": measured_table("test", OWN),
    "tuning": tuning_table(make_tuning(9)),
}


@pytest.mark.parametrize("name", STACKS)
def test_every_table_fits_80_columns_with_heads_and_cells_whole(name):
    check(STACKS[name])


RESULTS = {
    "images": make_result(),
    "not fine-tuned": make_result(is_finetuned=False),
    "a task": make_own_result(),
    "large": LARGE,
    "predicted latency": PREDICTED,
}


@pytest.mark.parametrize("name", RESULTS)
def test_the_final_table_fits_80_columns_and_cuts_no_figure(name):
    result = RESULTS[name]
    text = render(final_table(result))
    for part in final_table(result).renderables:
        if isinstance(part, Stack):
            check(part)
    assert "\N{HORIZONTAL ELLIPSIS}" not in text
    assert len(re.findall(TIMES_ROW, text)) == 2 * (1 + len(result["rates"]))


def test_the_accuracy_after_training_and_the_macs_come_first_and_fit_one_table():
    text = render(final_table(make_result()))
    first = text.split("How it got there")[0]
    heads, units = first.splitlines()[2:4]
    assert heads.split() == [
        *("rate", "top-1", "change", "MACs", "cost", "kept", "params", "ms", "for"),
        *("speed-up", "speed-up"),
    ]
    assert units.split()[:5] == ["kept", "%,", "test", "points", "M"]
    row = next(line for line in first.splitlines() if line.startswith("0.30"))
    assert row.split()[:4] == ["0.30", "87.88", "\N{MINUS SIGN}3.12", "12.00"]


@pytest.mark.parametrize("content", [CONTENT, THREE_BATCHES], ids=["two batches", "three"])
def test_a_benchmark_fits_80_columns(content):
    text = render(benchmark_table(content))
    check(next(part for part in benchmark_table(content).renderables if isinstance(part, Stack)))
    assert text.count("openvino-int8") >= 4 * (content is THREE_BATCHES)


def test_a_comparison_fits_80_columns_with_heads_whole():
    comparison = make_comparison(*map(make_run, FOURTEEN))
    check(next(part for part in comparison_table(comparison).renderables))
    assert "evaluations" in render(comparison_table(comparison))


def test_the_table_of_a_tuning_shows_every_setting_of_the_best_trials():
    result = make_tuning(9)
    text = check(tuning_table(result))
    assert len(tuning_header(result)) == 5 + 9
    for cell in tuning_rows(result)[0]:
        assert cell in text


PANELS = {
    "search": search_panel(
        replace(STATE, evaluations=12_345, total=99_999, num_alive=64, seconds_left=8000.0)
    ),
    "search of a task": search_panel(
        replace(STATE, metric=PSNR, best={0.5: replace(BEST, score=-12345.678)})
    ),
    "fine-tuning": finetune_panel(
        [replace(EPOCH, epoch=100, epochs=1000, seconds=12345.6, variant="lr=0.01 kd=0.5")]
    ),
    "tuning": tuning_panel([make_trial("trial-00001", 1.0, 1.0)]),
}


@pytest.mark.parametrize("name", PANELS)
def test_a_live_table_fits_80_columns_and_cuts_no_figure(name):
    text = render(PANELS[name])
    shown = {
        "search": ["12,345/99,999 evaluations  12.3/s  64 evaluators  2 h 13 min left", "81.23"],
        "search of a task": ["-12346", "29.99", "best PSNR (dB)"],
        "fine-tuning": ["100/1000", "12345.6", "3086 h 24 min", "(%, search)", "0.512", "kd=0.5"],
        "tuning": ["100.00", "mean over", "evaluations", "lr 0.00123"],
    }
    for words in shown[name]:
        assert words in text


cell = st.text("0123456789.", min_size=1, max_size=12)
column = st.tuples(cell, cell, st.lists(cell, min_size=3, max_size=3))


@settings(deadline=None)
@given(column, st.lists(st.lists(column, max_size=6), max_size=4), st.integers(34, 120))
def test_at_any_width_every_column_stands_in_one_table_whole(first, blocks, width):
    def make(number, drawn):
        head, unit, cells = drawn
        return Column(f"h{number}-{head}", unit, lambda row: cells[row["index"]])

    numbers = iter(range(100))
    stack = Stack(
        "",
        [make(next(numbers), first)],
        [[make(next(numbers), drawn) for drawn in block] for block in blocks],
        [{"index": index} for index in range(3)],
    )
    text = render(stack, width)
    heads = [word for line in text.splitlines() for word in line.split() if word[0] == "h"]
    expected = [column.head for block in stack.blocks for column in block]
    assert [head for head in heads if head != stack.names[0].head] == expected
    assert len(text.splitlines()) == 7 * heads.count(stack.names[0].head)  # each begins with a gap
