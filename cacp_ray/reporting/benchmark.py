"""Table, figure and conclusion of a benchmark: networks of a run in the formats that deploy them.

The input is the content of benchmark.json.
"""

from collections.abc import Iterator
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.reporting.figures import BLUE, GREY, ORANGE, style
from cacp_ray.reporting.summary import TIMES, Column, Row, binomial_error, sentence

ALLOWED = 1.0  # points of a share; elsewhere a hundredth of the base network's score
LOOKS: dict[str, dict[str, Any]] = {
    "torch": {"color": GREY, "marker": "v", "linestyle": "-"},
    "onnx": {"color": BLUE, "marker": "o", "linestyle": "-"},
    "onnx-int8": {"color": BLUE, "marker": "s", "linestyle": "--", "markerfacecolor": "white"},
    "openvino": {"color": ORANGE, "marker": "o", "linestyle": "-"},
    "openvino-int8": {
        "color": ORANGE, "marker": "s", "linestyle": "--", "markerfacecolor": "white",
    },
}  # fmt: skip


def benchmark_columns(content: dict[str, Any]) -> list[Column]:
    """Columns of the table: score, size, and latency with its spread for each batch size."""
    return [column for block in benchmark_blocks(content) for column in block]


def benchmark_blocks(content: dict[str, Any]) -> list[list[Column]]:
    """The columns in blocks: network and format, score and size, and one for each batch size."""
    metric = Metric(**content["metric"])
    names = [
        Column("rate", "kept", lambda row: row["network"]),
        Column("format", "", lambda row: row["format"]),
    ]
    score = Column(
        metric.name, "%" if metric.is_share else "", lambda row: metric.format(row["score"])
    )
    size = Column("size", "MB", lambda row: f"{row['size'] / 1e6:.2f}")
    batches = enumerate(timed["batch"] for timed in content["rows"][0]["latency"])
    return [names, [score, size], *([*_latency_columns(*batch)] for batch in batches)]


def _latency_columns(index: int, batch: int) -> Iterator[Column]:
    def median(row: Row) -> str:
        return f"{row['latency'][index]['median_ms']:.3g}"

    def spread(row: Row) -> str:
        first, third = row["latency"][index]["quartiles_ms"]
        return f"{(third - first) / 2:.2g}"

    yield Column(f"batch {batch}", "ms", median)
    yield Column("\N{PLUS-MINUS SIGN}", "", spread)
    yield Column("speed", TIMES, lambda row: f"{row['latency'][index]['speedup']:.2f}")


def describe_benchmark(content: dict[str, Any]) -> str:
    """What the columns say, in sentences."""
    metric, reference = Metric(**content["metric"]), content["reference"]
    base = content["rows"][0]["score"]
    error = ""
    if metric.is_share:
        points = 100 * binomial_error(base, content["images"])
        error = f" (standard error {points:.2f} points)"
    threads = "1 thread" if content["threads"] == 1 else f"{content['threads']} threads"
    return (
        f"{sentence(metric.name)} on the search split{error}. Times are medians of passes in turn "
        f"on {threads}, with half the distance of their quartiles. Speed is against "
        f"{reference['network']} in {reference['format']}."
    )


def conclude(content: dict[str, Any]) -> list[str]:
    """For each batch size, the fastest network that loses little against the base network."""
    metric, rows = Metric(**content["metric"]), content["rows"]
    base = rows[0]["score"]
    allowed = ALLOWED / metric.scale if metric.is_share else abs(base) / 100
    good = [row for row in rows if row["score"] >= base - allowed]
    sentences: list[str] = []
    for index, timed in enumerate(rows[0]["latency"]):
        best = min(good, key=lambda row: row["latency"][index]["median_ms"])
        latency = best["latency"][index]
        within = "1 point" if metric.is_share else "1 %"
        sentences.append(
            f"Batch {timed['batch']}: the fastest within {within} of the base network is "
            f"{best['network']} in {best['format']}, {latency['speedup']:.2f} times as fast, "
            f"{metric.describe(best['score'])}."
        )
    return sentences


def plot_benchmark(axes: Axes, content: dict[str, Any]) -> str:
    """Plots score against latency at the smallest batch, a line a format; returns the caption."""
    metric = Metric(**content["metric"])
    batch = content["rows"][0]["latency"][0]["batch"]
    for name, look in LOOKS.items():
        rows = [row for row in content["rows"] if row["format"] == name]
        rows.sort(key=lambda row: float(row["network"]) if row["network"] != "base" else 1.0)
        if not rows:
            continue
        x = [row["latency"][0]["median_ms"] for row in rows]
        y = [metric.scale * row["score"] for row in rows]
        axes.plot(x, y, label=name, markersize=6, linewidth=1.4, **look)
    for network in dict.fromkeys(row["network"] for row in content["rows"]):
        rows = [row for row in content["rows"] if row["network"] == network]
        x, y = min((row["latency"][0]["median_ms"], metric.scale * row["score"]) for row in rows)
        axes.annotate(
            network, (x, y), (-7, -3), textcoords="offset points", ha="right", fontsize=9
        )  # fmt: skip
    axes.set_xscale("log")
    axes.margins(x=0.12)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    style(axes, f"latency (ms, batch {batch})", metric.axis)
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(loc="outside upper center", ncols=3, fontsize=10, frameon=False)  # type: ignore[union-attr]
    return f"Left and up is better; rates stand beside their fastest format. {conclude(content)[0]}"
