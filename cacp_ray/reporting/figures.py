"""Figures of a run as PNG and SVG, drawn without pyplot: no window, no global state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cacp_ray.files import write_file
from cacp_ray.reporting.summary import search_images

# Narrow figures with large letters stay readable on a phone.
WIDTH = 5.8
DPI = 170
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"  # Okabe and Ito
MAX_LEGEND_RATES = 6

Plot = Callable[[Axes], str]  # draws, and returns the caption


@dataclass(frozen=True)
class Drawing:
    """A figure on disk, and what stands below it."""

    path: Path
    title: str
    caption: str


@dataclass(frozen=True)
class Episodes:
    """Successful measurements in the order recorded; all arrays are (N,)."""

    rate: NDArray[np.float64]
    cost_kept: NDArray[np.float64]
    top1: NDArray[np.float64]


def save_plots(
    plots: Sequence[tuple[str, str, Plot]], folder: Path, height: float = 4.0
) -> list[Drawing]:
    """Writes a PNG and an SVG file a plot.

    Args:
        plots: File name without its ending, title, and what draws it.
        folder: Where the files are written.
        height: Of a figure, in inches.
    """
    drawings = []
    for name, title, plot in plots:
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        caption = plot(figure.add_subplot())
        # Without versions, dates and random names equal figures are equal files.
        with mpl.rc_context({"svg.hashsalt": name}):
            for ending, nothing in (("png", "Software"), ("svg", "Date")):
                write_file(
                    folder / f"{name}.{ending}",
                    lambda file, kind=ending, nothing=nothing, figure=figure: figure.savefig(
                        file, format=kind, dpi=DPI, metadata={nothing: None}
                    ),
                )
        drawings.append(Drawing(folder / f"{name}.png", title, caption))
    return drawings


def read_episodes(table: pa.Table) -> Episodes:
    """The measurements that succeeded."""
    if table.num_rows == 0:
        return Episodes(np.empty(0), np.empty(0), np.empty(0))
    columns = [table[name].to_numpy() for name in ("rate", "cost_kept", "top1", "status")]
    rate, cost_kept, top1, status = columns
    is_ok = status == "ok"
    return Episodes(rate[is_ok], cost_kept[is_ok], top1[is_ok])


def plot_accuracy(axes: Axes, result: dict[str, Any], episodes: Episodes) -> str:
    """Top-1 on the search split against cost kept; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: row["cost_kept"])
    frontier = sorted(result["frontier"], key=lambda row: row["cost_kept"])
    search = result["base"].get("search") or {}
    shown: list[float] = []

    def draw(rows: list[dict[str, Any]], key: str, **style: Any) -> None:
        points = [
            (100 * row["cost_kept"], 100 * row[key]) for row in rows if row.get(key) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, **style)
            shown.extend(y)

    axes.scatter(
        100 * episodes.cost_kept, 100 * episodes.top1, s=9, c=GREY, alpha=0.25, linewidths=0,
        rasterized=True,  # in the SVG too: thousands of dots
    )  # fmt: skip
    if search.get("top1") is not None:
        shown.append(100 * search["top1"])
        axes.axhline(shown[-1], color="black", linestyle=":", linewidth=1.3, label="base")
    draw(rates, "uniform_top1", color=GREY, marker="x", linestyle=":", label="uniform")
    draw(frontier, "top1", color=GREEN, linewidth=1.5, linestyle="--", label="policy alone")
    draw(rates, "top1", color=BLUE, marker="o", label="before fine-tuning")
    draw(rates, "finetuned_top1", color=ORANGE, marker="s", label="after fine-tuning")
    num_hidden = limit_y(axes, np.array(shown), 100 * episodes.top1)
    style(axes, f"cost kept (% of {cost_name(result)})", "top-1, search split (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=False, loc="lower right")
    below = f" {num_hidden:,} of them lie below the axis." if num_hidden else ""
    return f"Dots: the {len(episodes.top1):,} episodes of the search.{below}{_part(result)}"


def plot_latency(axes: Axes, result: dict[str, Any]) -> str:
    """Best known top-1 on the search split against speed-up; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: row["rate"])
    is_finetuned = all(row.get("finetuned_top1") is not None for row in rates)
    key = "finetuned_top1" if is_finetuned else "top1"
    batch = f"{result.get('latency_batch', 'a batch of')} images"
    looks: list[tuple[str, str, dict[str, Any]]] = [
        ("", "1 image", {"color": BLUE, "marker": "o"}),
        ("batch_", batch, {"color": ORANGE, "marker": "s"}),
    ]
    for prefix, label, look in looks:
        known = [row for row in rates if row.get(f"{prefix}speedup") and row.get(key) is not None]
        if known:
            x = [row[f"{prefix}speedup"] for row in known]
            y = [100 * row[key] for row in known]
            axes.plot(x, y, label=label, **look)
            for row, *place in zip(known if not prefix else [], x, y, strict=False):
                name = f"{row['rate']:.2f}"
                axes.annotate(
                    name, (place[0], place[1]), (4, 4), textcoords="offset points", fontsize=9
                )
    top1 = (result["base"].get("search") or {}).get("top1")
    if top1 is not None:
        axes.plot([1], [100 * top1], color="black", marker="*", linestyle="", label="base")
    style(axes, "speed-up against the base (times)", "top-1, search split (%)")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=False)
    when = "after fine-tuning" if is_finetuned else "before fine-tuning"
    return (
        f"Accuracy {when} against measured speed in float32 on one thread; numbers are rates. "
        "Fewer MACs are not always faster for a single image."
    )


def plot_learning(axes: Axes, result: dict[str, Any], episodes: Episodes) -> str:
    """Best so far and running mean of every rate; returns the caption."""
    rates = sorted(row["rate"] for row in result["rates"])
    if len(episodes.top1) == 0:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no candidate was measured", ha="center", transform=axes.transAxes)
        return "No candidate was measured."
    window = max(5, len(episodes.top1) // (10 * max(1, len(rates))))
    shown: list[float] = []
    for rate, colour in zip(rates, rate_colours(len(rates)), strict=True):
        # A cheaper candidate serves this rate too, whichever rate it was proposed for.
        fits = np.flatnonzero(episodes.cost_kept <= rate + 1e-9)
        own = np.flatnonzero(np.isclose(episodes.rate, rate))
        best = np.maximum.accumulate(100 * episodes.top1[fits])
        mean = _running_mean(100 * episodes.top1[own], window)
        end = len(episodes.top1)
        steps = np.append(fits + 1, end) if len(fits) else fits
        values = np.append(best, best[-1:])
        marker = "o" if end == 1 else None
        look = {"color": colour, "marker": marker, "label": f"{rate:.2f}"}
        axes.plot(steps, values, drawstyle="steps-post", **look)
        axes.plot(own + 1, mean, color=colour, linewidth=1.1, linestyle="--")
        shown.extend(np.concatenate([best[len(best) // 20 :], mean[len(mean) // 20 :]]))
    limit_y(axes, np.array(shown), np.empty(0))
    style(axes, "measured candidates", "top-1, search split (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    rate_legend(axes)
    return (
        "Solid: best so far within the budget of the rate. Dashed: mean of the last "
        f"{window} candidates proposed for it.{_part(result)}"
    )


def rate_colours(count: int) -> NDArray[np.float64]:
    """(N, 4) colours of rates, the smallest first."""
    return mpl.colormaps["viridis"](np.linspace(0.0, 0.85, count))


def rate_legend(axes: Axes) -> None:
    """Names the labelled lines, one a rate, above the axes."""
    figure = axes.get_figure()
    assert figure is not None
    figure.legend(  # type: ignore[union-attr]
        title="rate (kept)",
        loc="outside upper center",
        ncols=min(len(axes.get_legend_handles_labels()[0]), MAX_LEGEND_RATES),
        fontsize=10,
        frameon=False,
    )


def style(axes: Axes, x_label: str, y_label: str) -> None:
    """Labels, letters and a light grid, alike in all figures."""
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def limit_y(axes: Axes, shown: NDArray[np.float64], dots: NDArray[np.float64]) -> int:
    """Sets the y axis for `shown` and all but the worst tenth of `dots`; returns dots left out."""
    shown = shown[~np.isnan(shown)]
    lows = [*shown, *np.quantile(dots, [0.1])] if len(dots) else [*shown]
    if not lows:
        return 0
    low, high = min(lows), max([*lows, *dots])
    margin = max(0.05 * (high - low), 1.0)
    axes.set_ylim(max(0.0, low - margin), min(100.5, high + margin))
    return int((dots < low - margin).sum())


def _part(result: dict[str, Any]) -> str:
    """That candidates were scored on fewer images than the saved networks, where they were."""
    images = search_images(result)
    return "" if images is None else f" Candidates are scored on {images:,} images of the split."


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    return (sums[stop] - sums[start]) / (stop - start)


def cost_name(result: dict[str, Any]) -> str:
    """What a rate limits, as it is written."""
    return "MACs" if result["cost"] == "macs" else result["cost"]
