"""Figures of a run as PNG and SVG, drawn without pyplot: no window, no global state."""

import base64
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

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.io.files import write_file
from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.summary import (
    base_score,
    cost_name,
    count_examples,
    metric_of,
    search_images,
    sentence,
)

# Narrow figures with large letters stay readable on a phone.
WIDTH, DPI = 5.8, 170
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6b7280"  # Okabe and Ito
MAX_LEGEND_RATES = 6

Plot = Callable[[Axes], str]  # draws, and returns the caption
Metrics = dict[float, dict[str, Any]]  # by rate, the content of metrics.json


@dataclass(frozen=True)
class Drawing:
    """A PNG file with the title and the caption of the figure."""

    path: Path
    title: str
    caption: str

    @property
    def source(self) -> str:
        """The image itself, as the source of an HTML image."""
        return f"data:image/png;base64,{base64.b64encode(self.path.read_bytes()).decode()}"


@dataclass(frozen=True)
class Episodes:
    """Successful measurements in the order recorded; all arrays are (N,)."""

    rate: NDArray[np.float64]
    cost_kept: NDArray[np.float64]
    score: NDArray[np.float64]


def save_figure(figure: Figure, folder: Path, name: str) -> list[Path]:
    """Writes a PNG and an SVG file; equal figures are equal files, without dates or versions."""
    paths: list[Path] = []
    with mpl.rc_context({"svg.hashsalt": name}):
        for kind, left_out in (("png", ["Software"]), ("svg", ["Date", "Creator"])):
            paths.append(folder / f"{name}.{kind}")
            look = {"format": kind, "dpi": DPI, "metadata": dict.fromkeys(left_out)}
            write_file(paths[-1], lambda file, look=look: figure.savefig(file, **look))
    return paths


Save = Callable[[Figure, Path, str], list[Path]]  # as `save_figure`


def save_plots(
    plots: Sequence[tuple[str, str, Plot]],
    folder: Path,
    height: float = 4.0,
    save: Save = save_figure,
) -> list[Drawing]:
    """Writes the figures of plots, each given as file name, title and drawing function."""
    drawings: list[Drawing] = []
    for name, title, plot in plots:
        figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
        caption = plot(figure.add_subplot())
        drawings.append(Drawing(save(figure, folder, name)[0], title, caption))
    return drawings


def read_episodes(table: pa.Table) -> Episodes:
    """The measurements that succeeded."""
    if table.num_rows == 0:
        return Episodes(np.empty(0), np.empty(0), np.empty(0))
    columns = [table[name].to_numpy() for name in ("rate", "cost_kept", "score", "status")]
    rate, cost_kept, score, status = columns
    is_ok = status == "ok"
    return Episodes(rate[is_ok], cost_kept[is_ok], score[is_ok])


def plot_accuracy(axes: Axes, result: dict[str, Any], episodes: Episodes) -> str:
    """Plots top-1 on the search split against cost kept; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: row["cost_kept"])
    scale = metric_of(result).scale
    frontier = sorted(result["frontier"], key=lambda row: row["cost_kept"])
    score = base_score(result, "search")
    shown: list[float] = []

    def draw(rows: list[dict[str, Any]], key: str, **look: Any) -> None:
        known = [row for row in rows if row.get(key) is not None]
        if known:
            y = [scale * row[key] for row in known]
            axes.plot([100 * row["cost_kept"] for row in known], y, **look)
            shown.extend(y)

    axes.scatter(
        100 * episodes.cost_kept, scale * episodes.score, s=9, c=GREY, alpha=0.25, linewidths=0,
        rasterized=True,  # also in the SVG: there are thousands of dots
    )  # fmt: skip
    if score is not None:
        shown.append(scale * score)
        axes.axhline(shown[-1], color="black", linestyle=":", linewidth=1.3, label="base")
    draw(rates, "uniform_score", color=GREY, marker="x", linestyle=":", label="uniform")
    draw(frontier, "score", color=GREEN, linewidth=1.5, linestyle="--", label="policy alone")
    draw(rates, "score", color=BLUE, marker="o", label="before fine-tuning")
    cuts = [row | {"cut": row["score"]} for row in result.get("trained_frontier") or ()]
    tuned = [row | {"cut": row["finetuned_score"]} for row in rates if row.get("finetuned_score")]
    if cuts:
        line = sorted([*cuts, *tuned], key=lambda row: row["cost_kept"])
        draw(line, "cut", color=ORANGE, linewidth=1.5, linestyle="--", label="cut from trained")
    draw(
        tuned,
        "finetuned_score",
        color=ORANGE,
        marker="s",
        label="after fine-tuning",
        linestyle="" if cuts else "-",
    )
    num_hidden = limit_y(axes, np.array(shown), scale * episodes.score, metric_of(result))
    style(axes, f"cost kept (% of {cost_name(result['cost'])})", metric_of(result).axis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=False, loc="lower right")
    below = f" {num_hidden:,} of them lie below the axis." if num_hidden else ""
    return f"Dots: the {len(episodes.score):,} episodes of the search.{below}{_scored_on(result)}"


def plot_latency(axes: Axes, result: dict[str, Any]) -> str:
    """Plots the last top-1 on the search split against speed-up; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: row["rate"])
    scale = metric_of(result).scale
    is_finetuned = all(row.get("finetuned_score") is not None for row in rates)
    key = "finetuned_score" if is_finetuned else "score"
    metric = metric_of(result)
    batch = count_examples(metric, result.get("latency_batch", "a batch of"))
    looks: list[tuple[str, str, dict[str, Any]]] = [
        ("", count_examples(metric, 1), {"color": BLUE, "marker": "o"}),
        ("batch_", batch, {"color": ORANGE, "marker": "s"}),
    ]
    for prefix, label, look in looks:
        known = [row for row in rates if row.get(f"{prefix}speedup") and row.get(key) is not None]
        if known:
            x = [row[f"{prefix}speedup"] for row in known]
            y = [scale * row[key] for row in known]
            axes.plot(x, y, label=label, **look)
            for row, *place in zip(known if not prefix else [], x, y, strict=False):
                name, point = format_rate(row["rate"]), (place[0], place[1])
                axes.annotate(name, point, (4, 4), textcoords="offset points", fontsize=9)
    score = base_score(result, "search")
    if score is not None:
        axes.plot([1], [scale * score], color="black", marker="*", linestyle="", label="base")
    style(axes, "speed-up against the base (times)", metric_of(result).axis)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=10, frameon=False)
    when = "after fine-tuning" if is_finetuned else "before fine-tuning"
    return (
        f"{sentence(metric.name)} {when} against measured speed in float32 on one thread; numbers "
        f"are rates. Fewer MACs are not always faster for a single {metric.example}."
    )


def plot_progress(axes: Axes, result: dict[str, Any], episodes: Episodes) -> str:
    """Plots the best so far and the running mean of every rate; returns the caption."""
    rates = sorted(row["rate"] for row in result["rates"])
    if len(episodes.score) == 0:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "no candidate was measured", ha="center", transform=axes.transAxes)
        return "No candidate was measured."
    scale = metric_of(result).scale
    window = max(5, len(episodes.score) // (10 * max(1, len(rates))))
    shown: list[float] = []
    for rate, colour in zip(rates, rate_colours(len(rates)), strict=True):
        # A cheaper candidate serves this rate too, whichever rate it was proposed for.
        fits = np.flatnonzero(episodes.cost_kept <= rate + 1e-9)
        own = np.flatnonzero(np.isclose(episodes.rate, rate))
        best = np.maximum.accumulate(scale * episodes.score[fits])
        mean = _running_mean(scale * episodes.score[own], window)
        end = len(episodes.score)
        steps = np.append(fits + 1, end) if len(fits) else fits
        values = np.append(best, best[-1:])
        marker = "o" if end == 1 else None
        look = {"color": colour, "marker": marker, "label": format_rate(rate)}
        axes.plot(steps, values, drawstyle="steps-post", **look)
        axes.plot(own + 1, mean, color=colour, linewidth=1.1, linestyle="--")
        shown.extend(np.concatenate([best[len(best) // 20 :], mean[len(mean) // 20 :]]))
    limit_y(axes, np.array(shown), np.empty(0), metric_of(result))
    style(axes, "measured candidates", metric_of(result).axis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    rate_legend(axes)
    return (
        "Solid: best so far within the budget of the rate. Dashed: mean of the last "
        f"{window} candidates proposed for it.{_scored_on(result)}"
    )


def plot_finetuning(axes: Axes, result: dict[str, Any], metrics: Metrics) -> str:
    """Plots top-1 on the search split after every epoch; returns the caption."""
    shown: list[float] = []
    scale = metric_of(result).scale
    epochs = 0
    for (rate, content), colour in zip(metrics.items(), rate_colours(len(metrics)), strict=True):
        values = [scale * content["search_score_before"]]
        values += [scale * epoch["search_score"] for epoch in content["history"]]
        axes.plot(range(len(values)), values, color=colour, label=format_rate(rate))
        best = content["best_epoch"]
        axes.plot([best], [values[best]], color=colour, marker="o")
        shown += values
        epochs = max(epochs, len(values) - 1)
    score = base_score(result, "search")
    if score is not None:
        axes.axhline(scale * score, color="black", linestyle=":", linewidth=1.3)
        shown.append(scale * score)
    limit_y(axes, np.array(shown), np.empty(0), metric_of(result))
    axes.set_xlim(0, max(1, epochs) * 1.02)
    style(axes, "epochs", metric_of(result).axis)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    rate_legend(axes)
    whole = " Dotted: the base network." if score is not None else ""
    return f"Epoch 0: the network of the search. Dot: the epoch whose weights are kept.{whole}"


def rate_colours(count: int) -> NDArray[np.float64]:
    """Colours (N, 4) of rates, the smallest first."""
    return mpl.colormaps["viridis"](np.linspace(0.0, 0.85, count))


def rate_legend(axes: Axes) -> None:
    """Writes the key of the labelled lines, one for each rate, above the axes."""
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
    """Sets labels, letter sizes and a light grid, the same in all figures."""
    axes.set_xlabel(x_label, fontsize=11)
    axes.set_ylabel(y_label, fontsize=11)
    axes.tick_params(labelsize=10)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def limit_y(
    axes: Axes, shown: NDArray[np.float64], dots: NDArray[np.float64], metric: Metric
) -> int:
    """Fits the y axis to `shown` and the best 90 % of `dots`; returns the number of hidden dots."""
    shown = shown[~np.isnan(shown)]
    lows = [*shown, *np.quantile(dots, [0.1])] if len(dots) else [*shown]
    if not lows:
        return 0
    low, high = min(lows), max([*lows, *dots])
    if metric.is_share:
        margin = max(0.05 * (high - low), 1.0)
        axes.set_ylim(max(0.0, low - margin), min(100.5, high + margin))
    else:
        margin = 0.05 * (high - low) or 1.0
        axes.set_ylim(low - margin, high + margin)
    return int((dots < low - margin).sum())


def _scored_on(result: dict[str, Any]) -> str:
    """Says so where candidates were scored on fewer images than the saved networks."""
    images = search_images(result)
    return "" if images is None else f" Candidates are scored on {images:,} images of the split."


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    stop = np.arange(1, len(values) + 1)
    start = np.maximum(0, stop - window)
    return (sums[stop] - sums[start]) / (stop - start)
