"""The figure of a comparison, and all its files."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import write_json
from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.comparison import UNFINISHED, Comparison, Point
from cacp_ray.reporting.comparison_table import (
    comparison_columns,
    comparison_notes,
    comparison_title,
)
from cacp_ray.reporting.figures import DPI, GREY, Drawing, limit_y, save_figure, style
from cacp_ray.reporting.html import write_page
from cacp_ray.reporting.summary import cost_name

JSON_FILE = "comparison.json"
# Okabe and Ito without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
MARKERS = "osD^vPXp<>hd8H"
WIDTH, UPPER, LOWER, ROW = 8.0, 4.6, 0.9, 0.24  # inches; a row of the lower panels is a run
MAX_PANELS = 5


def check_out(out: Path) -> None:
    """Checks that a folder is new, empty, or holds an earlier comparison.

    Raises:
        ArtifactError: It holds something else.
    """
    is_free = not out.exists() or (out.is_dir() and not any(out.iterdir()))
    if not is_free and not (out / JSON_FILE).exists():
        raise ArtifactError(f"{out} exists and holds no comparison: choose another folder")


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Writes report.html and comparison.png, .svg and .json; replaces an earlier comparison.

    Raises:
        ArtifactError: `out` holds something else.
    """
    check_out(out)
    # The JSON file marks the folder as a comparison, so it comes first, in case of a kill.
    write_json(out / JSON_FILE, comparison.as_json())
    png, svg = save_figure(draw_comparison(comparison), out, "comparison")
    name, effort, blocks = comparison_columns(comparison)
    columns = [name, *effort, *itertools.chain(*blocks)]
    rows = [dataclasses.asdict(run) for run in comparison.runs]
    markers = "Full markers: the best candidate within each rate. Hollow: the policy's own answer."
    what = "Accuracy" if comparison.metric.is_share else "Score"
    report = write_page(
        out / "report.html",
        "comparison.html.jinja",
        metric=comparison.metric,
        title=comparison_title(comparison),
        columns=columns,
        rows=[[column.text(row) for column in columns] for row in rows],
        paths=[(run.label, run.path) for run in comparison.runs],
        notes=comparison_notes(comparison),
        figure=Drawing(png, f"{what} against cost", markers),
    )
    return [report, png, svg, out / JSON_FILE]


def draw_comparison(comparison: Comparison) -> Figure:
    """Draws accuracy against cost kept, and below it a panel for each rate.

    Each panel has its own accuracy axis. Its rows name the runs and are the key of the upper plot.
    """
    rates = _evenly(comparison.rates, MAX_PANELS)
    height = UPPER + LOWER + ROW * len(comparison.runs)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, max(1, len(rates)), height_ratios=(UPPER, height - UPPER))
    plot_frontiers(figure.add_subplot(grid[0, :]), comparison)
    first: Axes | None = None
    for number, rate in enumerate(rates):
        axes = figure.add_subplot(grid[1, number], sharey=first)
        plot_rate(axes, comparison, rate)
        axes.tick_params(labelleft=first is None)
        first = first or axes
    if comparison.standard_errors:
        shaded = "less than one standard error of the difference of two runs below the best."
        figure.supxlabel(f"Shaded: {shaded}", fontsize=10)
    return figure


def plot_frontiers(axes: Axes, comparison: Comparison) -> None:
    """Plots the best at each cost, the winner of every rate, and the policies' own answers."""
    metric = comparison.metric
    shown = np.array([[100.0], [metric.scale]])  # of cost and score
    base = metric.scale * comparison.base_score
    if comparison.images == comparison.base_images:  # otherwise the images differ
        axes.axhline(base, color="black", linestyle=":", linewidth=1.3, label="base network")
    points: list[Point] = []
    for number, run in enumerate(comparison.runs):
        colour, marker, line = _look(number)
        if run.frontier:
            cost, score = shown * np.array([*run.frontier, (1.0, run.frontier[-1][1])]).T
            look = {"color": colour, "linestyle": line, "linewidth": 1.2, "alpha": 0.7}
            axes.plot(cost, score, drawstyle="steps-post", **look)
        for by_rate, face in ((run.policy_points, "white"), (run.winners, colour)):
            if by_rate:
                cost, score = shown * np.array(list(by_rate.values())).T
                axes.plot(cost, score, linestyle="", marker=marker, zorder=3, **_fill(colour, face))
                points += by_rate.values()
    if points:
        cost, score = shown * np.array(points).T
        limit_y(axes, np.array([base, *score]), np.empty(0), metric)
        span = max(max(cost) - min(cost), 5.0)
        axes.set_xlim(max(0.0, min(cost) - 0.08 * span), min(100.5, max(cost) + 0.12 * span))
    key: list[tuple[str, dict[str, Any]]] = [
        ("best measured at each cost", {"linewidth": 1.2}),
        ("best within a rate", {"linestyle": "", "marker": "o"}),
    ]
    if any(run.policy_points for run in comparison.runs):
        hollow = {"linestyle": "", "marker": "o", "markerfacecolor": "white"}
        key.append(("policy alone", hollow))
    for label, look in key:
        axes.plot([], [], color=GREY, label=label, **look)
    style(axes, f"cost kept (% of {cost_name(comparison.cost)})", metric.axis)
    axes.legend(fontsize=10, frameon=False, loc="lower right")


def plot_rate(axes: Axes, comparison: Comparison, rate: float) -> None:
    """Plots each run's best at one rate and its policy's own answer, the first run on top."""
    runs, scale = comparison.runs, comparison.metric.scale
    best = max(
        (score for run in runs if (score := run.search_score.get(rate)) is not None), default=0
    )
    if error := comparison.standard_errors.get(rate):
        axes.axvspan(scale * (best - error), scale * best, color=GREY, alpha=0.15, linewidth=0)
    for number, run in enumerate(runs):
        colour, marker, _ = _look(number)
        for score, face in ((run.policy_score, "white"), (run.search_score, colour)):
            if (value := score.get(rate)) is not None:
                axes.plot(scale * value, number, linestyle="", marker=marker, **_fill(colour, face))
    names = [run.label if run.is_finished else f"{run.label} {UNFINISHED}" for run in runs]
    axes.set_yticks(range(len(runs)), names, parse_math=False)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.margins(x=0.12)
    style(axes, "top-1 (%)" if scale > 1 else comparison.metric.name, "")
    axes.set_title(f"rate {format_rate(rate)} (kept)", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))


def _look(number: int) -> tuple[str, str, str]:
    """Colour, marker and line of a run; 21 runs differ."""
    line = LINES[number // len(COLOURS) % len(LINES)]
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], line


def _fill(colour: str, face: str) -> dict[str, Any]:
    """Look of a marker; a full one has a white edge, so that neighbours stay apart."""
    if face == colour:
        return {"color": colour, "markersize": 8.0, "markeredgecolor": "white"}
    return {"color": colour, "markersize": 6.5, "markerfacecolor": face}


def _evenly(rates: Sequence[float], count: int) -> list[float]:
    """All rates, or `count` of them, evenly spaced with both ends."""
    places = np.unique(np.linspace(0, len(rates) - 1, min(count, len(rates))).round().astype(int))
    return [rates[place] for place in places]
