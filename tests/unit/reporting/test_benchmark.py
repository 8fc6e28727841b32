"""Table, conclusion and figure of a benchmark, from the content of benchmark.json."""

import copy

import pytest
from matplotlib.figure import Figure

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import write_json
from cacp_ray.reporting.benchmark import conclude, describe_benchmark, plot_benchmark
from cacp_ray.reporting.run_report import read_benchmark
from cacp_ray.reporting.tables import benchmark_table, make_console


def timed(batch, median, speedup):
    quartiles = [0.9 * median, 1.1 * median]
    return {"batch": batch, "median_ms": median, "quartiles_ms": quartiles, "speedup": speedup}


def row(network, format, score, *latencies):
    return {
        "network": network, "format": format, "size": 1_100_000, "score": score,
        "latency": list(latencies),
    }  # fmt: skip


CONTENT = {
    "name": "mine",
    "metric": {"name": "top-1", "is_share": True},
    "images": 5000,
    "threads": 1,
    "reference": {"network": "base", "format": "torch"},
    "rows": [
        row("base", "torch", 0.92, timed(1, 6.4, 1.0), timed(64, 90.0, 1.0)),
        row("base", "onnx-int8", 0.915, timed(1, 1.3, 4.9), timed(64, 50.0, 1.8)),
        row("0.7", "torch", 0.912, timed(1, 6.1, 1.05), timed(64, 40.0, 2.25)),
        row("0.7", "onnx-int8", 0.90, timed(1, 1.0, 6.4), timed(64, 20.0, 4.5)),
    ],
}


def printed(content, capsys):
    make_console().print(benchmark_table(content))
    return capsys.readouterr().out


def test_the_conclusion_is_the_fastest_that_loses_little():
    one, many = conclude(CONTENT)
    assert one == (
        "Batch 1: the fastest within 1 point of the base network is base in onnx-int8, 4.90 times "
        "as fast, 91.50 % top-1."
    )
    assert "Batch 64: the fastest within 1 point of the base network is 0.7 in torch" in many


def test_scores_of_one_s_own_may_lose_a_hundredth():
    content = copy.deepcopy(CONTENT) | {"metric": {"name": "PSNR (dB)", "is_share": False}}
    for each, score in zip(content["rows"], (30.0, 29.8, 29.5, 20.0), strict=True):
        each["score"] = score
    assert "within 1 % of the base network is base in onnx-int8" in conclude(content)[0]
    assert "standard error" not in describe_benchmark(content)


def test_the_table_has_80_columns_at_most(capsys):
    lines = printed(CONTENT, capsys).splitlines()
    rows = [line for line in lines if "onnx-int8" in line and "Batch" not in line]
    assert rows[0].split() == [
        "base",
        "onnx-int8",
        "91.50",
        "1.10",
        "1.3",
        "0.13",
        "4.90",
        "50",
        "5",
        "1.80",
    ]
    assert max(len(line.rstrip()) for line in lines[:9]) <= 80


def test_the_figure_has_a_line_a_format():
    axes = Figure().add_subplot()
    caption = plot_benchmark(axes, CONTENT)
    assert [line.get_label() for line in axes.get_lines()] == ["torch", "onnx-int8"]
    assert "Batch 1" in caption


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.pop("rows"),
        lambda content: content["rows"][0].update(score=None),
        lambda content: content["rows"][1]["latency"].pop(),
        lambda content: content["rows"][1]["latency"][0].update(speedup=0),
    ],
)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, spoil):
    content = copy.deepcopy(CONTENT)
    spoil(content)
    write_json(tmp_path / "benchmark.json", content)
    with pytest.raises(ArtifactError, match=r"benchmark\.json"):
        read_benchmark(tmp_path)
