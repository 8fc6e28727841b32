"""Several runs side by side as a figure, and the files of a comparison."""

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cacp_ray.errors import ArtifactError
from cacp_ray.files import write_file, write_json
from cacp_ray.reporting.comparison import UNFINISHED, Comparison, Point
from cacp_ray.reporting.comparison_table import TITLE, comparison_columns, comparison_notes
from cacp_ray.reporting.figures import DPI, GREY, Drawing, style
from cacp_ray.reporting.html import embed_figure, fill_page

JSON_FILE = "comparison.json"
# Okabe and Ito without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
MARKERS = "osD^vPXp<>hd8H"
WIDTH, UPPER, LOWER, ROW = 8.0, 4.6, 0.9, 0.24  # inches; a row of the lower panels is a run
MAX_PANELS = 5


def check_out(out: Path) -> None:
    """Refuses a folder that holds something else than a comparison.

    Raises:
        ArtifactError: It does.
    """
    if out.exists() and not (out / JSON_FILE).exists() and not _is_empty(out):
        raise ArtifactError(f"{out} exists and holds no comparison: choose another folder")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def write_comparison(comparison: Comparison, out: Path) -> list[Path]:
    """Writes report.html, and comparison.png, .svg and .json, over those of an earlier one.

    Raises:
        ArtifactError: `out` holds something else.
    """
    check_out(out)
    # The JSON file says what the folder is: it comes first, so that a kill leaves no other kind.
    write_json(out / JSON_FILE, comparison.as_json())
    figure = draw_comparison(comparison)
    png, svg = out / "comparison.png", out / "comparison.svg"
    # Without version, date and random names, equal comparisons are equal files.
    canvas = FigureCanvasAgg(figure)
    write_file(png, lambda file: canvas.print_png(file, metadata={"Software": None}))
    with mpl.rc_context({"svg.hashsalt": "comparison"}):
        vector = FigureCanvasSVG(figure)
        plain = {"Date": None, "Creator": None}
        write_file(svg, lambda file: vector.print_svg(file, metadata=plain))
    page = render_comparison(comparison, png)
    report = out / "report.html"
    write_file(report, lambda file: file.write_text(page, encoding="utf-8"))
    return [report, png, svg, out / JSON_FILE]


def render_comparison(comparison: Comparison, png: Path) -> str:
    """The HTML of a comparison: table, notes, figure; needs nothing beside it."""
    name, effort, blocks = comparison_columns(comparison)
    columns = [name, *effort, *itertools.chain(*blocks)]
    rows = [dataclasses.asdict(run) for run in comparison.runs]
    chance = "Full markers: the best candidate within each rate. Hollow: the policy's own answer."
    drawing = Drawing(png, "Accuracy against cost", chance)
    return fill_page(
        "comparison.html.jinja",
        title=TITLE,
        columns=columns,
        rows=[[column.text(row) for column in columns] for row in rows],
        paths=[(run.label, run.path) for run in comparison.runs],
        notes=comparison_notes(comparison),
        figure=embed_figure(drawing),
    )


def draw_comparison(comparison: Comparison) -> Figure:
    """Accuracy against cost kept; below it one panel a rate with an accuracy axis of its own.

    The rows of the lower panels name the runs: they are the key of the upper one.
    """
    rates = _evenly(comparison.rates, MAX_PANELS)
    height = UPPER + LOWER + ROW * len(comparison.runs)
    figure = Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(
        2, max(1, len(rates)), height_ratios=(UPPER, LOWER + ROW * len(comparison.runs))
    )
    plot_frontiers(figure.add_subplot(grid[0, :]), comparison)
    first: Axes | None = None
    for number, rate in enumerate(rates):
        axes = figure.add_subplot(grid[1, number], sharey=first)
        plot_rate(axes, comparison, rate)
        axes.tick_params(labelleft=first is None)
        first = first or axes
    if comparison.standard_errors:
        chance = (
            "Shaded: less than one standard error of the difference of two runs below the best."
        )
        figure.supxlabel(chance, fontsize=10)
    return figure


def plot_frontiers(axes: Axes, comparison: Comparison) -> None:
    """The best measured at each cost, the winner of every rate, and what the policies answer."""
    base = 100 * comparison.base_top1
    if comparison.images == comparison.base_images:  # else it is of other images
        axes.axhline(base, color="black", linestyle=":", linewidth=1.3, label="base network")
    points: list[Point] = []
    for number, run in enumerate(comparison.runs):
        colour, marker, line = _look(number)
        if run.frontier:
            cost, top1 = 100 * np.array([*run.frontier, (1.0, run.frontier[-1][1])]).T
            look = {"color": colour, "linestyle": line, "linewidth": 1.2, "alpha": 0.7}
            axes.plot(cost, top1, drawstyle="steps-post", **look)
        for found, face in ((run.policy_points, "white"), (run.winners, colour)):
            if found:
                cost, top1 = 100 * np.array(list(found.values())).T
                axes.plot(cost, top1, linestyle="", marker=marker, zorder=3, **_fill(colour, face))
                points += found.values()
    if points:
        cost, top1 = 100 * np.array(points).T
        margin = max(0.06 * (base - min(top1)), 1.0)
        axes.set_ylim(max(0.0, min(top1) - margin), min(100.5, max(base, *top1) + margin))
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
    cost_name = "MACs" if comparison.cost == "macs" else comparison.cost
    style(axes, f"cost kept (% of {cost_name})", "top-1, search split (%)")
    axes.legend(fontsize=10, frameon=False, loc="lower right")


def plot_rate(axes: Axes, comparison: Comparison, rate: float) -> None:
    """A row a run, the first on top: its best at one rate, and the policy's own answer."""
    runs = comparison.runs
    best = max((top1 for run in runs if (top1 := run.search_top1.get(rate)) is not None), default=0)
    error = comparison.standard_errors.get(rate, 0.0)
    axes.axvspan(100 * (best - error), 100 * best, color=GREY, alpha=0.15, linewidth=0)
    for number, run in enumerate(runs):
        colour, marker, _ = _look(number)
        for top1, face in ((run.policy_top1, "white"), (run.search_top1, colour)):
            if (value := top1.get(rate)) is not None:
                axes.plot(100 * value, number, linestyle="", marker=marker, **_fill(colour, face))
    names = [run.label if run.is_finished else f"{run.label} {UNFINISHED}" for run in runs]
    axes.set_yticks(range(len(runs)), names, parse_math=False)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.margins(x=0.12)
    style(axes, "top-1 (%)", "")
    axes.set_title(f"rate {rate:.2f} (kept)", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4, min_n_ticks=2))


def _look(number: int) -> tuple[str, str, str]:
    """Colour, marker and line of the run in a place; 21 differ."""
    line = LINES[number // len(COLOURS) % len(LINES)]
    return COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)], line


def _fill(colour: str, face: str) -> dict[str, Any]:
    """Of a marker; full ones have a white edge, so that neighbours stay apart."""
    if face == colour:
        return {"color": colour, "markersize": 8.0, "markeredgecolor": "white"}
    return {"color": colour, "markersize": 6.5, "markerfacecolor": face}


def _evenly(rates: Sequence[float], count: int) -> list[float]:
    """All rates, or `count` of them with both ends."""
    places = np.unique(np.linspace(0, len(rates) - 1, min(count, len(rates))).round().astype(int))
    return [rates[place] for place in places]
