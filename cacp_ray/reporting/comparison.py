"""Several runs side by side: one table, one figure, one JSON file."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacp_ray.errors import ArtifactError
from cacp_ray.files import write_file, write_json
from cacp_ray.reporting.figures import DPI, GREY, style
from cacp_ray.reporting.summary import Column, format_percent, format_seconds
from cacp_ray.reporting.tables import PLAIN_WIDTH

JSON_FILE = "comparison.json"
# Okabe and Ito without the yellow, which is faint on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
MARKERS = "osD^vPXp<>hd8H"
WIDTH, UPPER, LOWER, ROW = 8.0, 4.6, 0.9, 0.24  # inches; a row of the lower panels is a run
MAX_PANELS = 5
MAX_NAME = 34  # columns; a longer path is folded
UNFINISHED = "(unfinished)"

Point = tuple[float, float]  # cost kept and top-1, both shares
ByRate = dict[float, float | None]


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison says of one run; accuracies are shares on the search split, as scored.

    Attributes:
        label: Strategy; with the folder where runs share one.
        path: Of the run.
        strategy: Its name.
        is_finished: Whether the search has ended; if not, all figures are those so far.
        searched: Whether one search served all rates, or each rate had its own.
        evaluations: Distinct candidates so far.
        asked: Distinct candidates that the configuration grants.
        known: Of `evaluations`, those that a measurement of another run answered.
        seconds: Of the search phase; None where it has not ended.
        search_top1: By rate, the best candidate within the budget, before fine-tuning.
        policy_top1: By rate, what the trained policy itself answers; empty where there is none.
        winners: By rate, where `search_top1` lies.
        policy_points: By rate, where `policy_top1` lies.
        frontier: The best measured at each cost or below; both coordinates rise.
    """

    label: str
    path: str
    strategy: str
    is_finished: bool
    searched: Literal["together", "separately"]
    evaluations: int
    asked: int
    known: int
    seconds: float | None
    search_top1: ByRate
    policy_top1: ByRate
    winners: dict[float, Point]
    policy_points: dict[float, Point]
    frontier: tuple[Point, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same network, data, cost, order, recovery and evaluation settings.

    Attributes:
        cost: What a rate limits.
        base_top1: Of the whole network on the whole search split.
        base_images: Of the whole search split.
        images: That scored each candidate.
        runs: In the order given.
    """

    cost: str
    base_top1: float
    base_images: int
    images: int
    runs: tuple[ComparedRun, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates of any run, the smallest first."""
        return tuple(sorted({rate for run in self.runs for rate in run.search_top1}))

    @property
    def common_rates(self) -> tuple[float, ...]:
        """Rates of every run: only over these can means be compared."""
        return tuple(r for r in self.rates if all(r in run.search_top1 for run in self.runs))

    def mean(self, top1: ByRate) -> float | None:
        """Over the rates of every run; None where a figure is missing."""
        values = [top1.get(rate) for rate in self.common_rates]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    @property
    def standard_errors(self) -> dict[float, float]:
        """By rate, the binomial standard error of the difference of two runs.

        As if each run had been scored on images of its own, both as accurate as the mean of the
        runs. On the same images it is smaller, but a record does not say which images were right.
        """
        errors = {}
        for rate in self.rates if self.images else ():
            values = [run.search_top1.get(rate) for run in self.runs]
            known = [value for value in values if value is not None]
            if known:
                mean = sum(known) / len(known)
                errors[rate] = math.sqrt(2 * mean * (1 - mean) / self.images)
        return errors

    def as_json(self) -> dict[str, Any]:
        """All figures of the table and of the figure; rates are texts such as 0.30."""
        runs = []
        for run in self.runs:
            values = dataclasses.asdict(run)
            for key in ("search_top1", "policy_top1", "winners", "policy_points"):
                values[key] = {f"{rate:.2f}": value for rate, value in values[key].items()}
            values["mean_search_top1"] = self.mean(run.search_top1)
            values["mean_policy_top1"] = self.mean(run.policy_top1)
            runs.append(values)
        return {
            "cost": self.cost,
            "base_top1": self.base_top1,
            "base_images": self.base_images,
            "images": self.images,
            "rates": list(self.rates),
            "mean_over": list(self.common_rates),
            "standard_errors": {f"{r:.2f}": error for r, error in self.standard_errors.items()},
            "runs": runs,
        }


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
    """Writes comparison.png, comparison.svg and comparison.json, over those of an earlier one.

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
    return [png, svg, out / JSON_FILE]


def comparison_table(comparison: Comparison, width: int = PLAIN_WIDTH) -> RenderableType:
    """A row a run; what does not fit `width` columns goes on in tables below, a row a run again."""
    rows = [dataclasses.asdict(run) for run in comparison.runs]
    title = "Before fine-tuning: top-1 in % on the search split, by rate (kept)"
    name = Column("run", "", lambda r: r["label"] + ("" if r["is_finished"] else f"\n{UNFINISHED}"))
    effort = [
        Column("rates", "", lambda row: row["searched"]),
        Column("evalua-", "tions", lambda row: f"{row['evaluations']:,}"),
        Column("search", "time", lambda row: format_seconds(row["seconds"])),
    ]
    blocks = [_accuracy_columns(comparison, "best", "search_top1")]
    if any(run.policy_top1 for run in comparison.runs):
        blocks.append(_accuracy_columns(comparison, "policy", "policy_top1"))
    tables = [_table(title, [name, *effort, *itertools.chain(*blocks)], rows)]
    if _width(tables[0]) > width:
        tables, columns = [], [name, *effort]
        for block in blocks:
            for column in block:
                if _width(_table("", [*columns, column], rows)) > width and len(columns) > 1:
                    tables.append(_table("" if tables else title, columns, rows))
                    columns = [name]
                columns.append(column)
            tables.append(_table("" if tables else title, columns, rows))
            columns = [name]
    spaced = [part for table in tables for part in (table, Text(""))]
    return Group(*spaced, Text("\n".join(_notes(comparison))))


def _accuracy_columns(comparison: Comparison, head: str, key: str) -> list[Column]:
    columns = [
        Column(head, f"{rate:.2f}", lambda row, rate=rate: _cell(row[key], rate))
        for rate in comparison.rates
    ]
    return [*columns, Column(head, "mean", lambda row: _mean_cell(comparison, row[key]))]


def _cell(top1: ByRate, rate: float) -> str:
    """Blank where the run did not search the rate, or has no policy."""
    return format_percent(top1[rate]) if rate in top1 else ""


def _mean_cell(comparison: Comparison, top1: ByRate) -> str:
    return format_percent(comparison.mean(top1)) if top1 else ""


def _table(title: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    for column in columns:
        is_text = column.head in ("run", "rates")
        table.add_column(
            Text(f"{column.head}\n{column.unit}"),
            justify="left" if is_text else "right",
            no_wrap=column.head != "run",
            max_width=MAX_NAME if column.head == "run" else None,
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(column.text(row)) for column in columns))
    return table


def _width(table: Table) -> int:
    """Columns that a table needs so that nothing in it is folded."""
    return Console(width=1000).measure(table).maximum


def _notes(comparison: Comparison) -> list[str]:
    """What the table leaves open, a sentence or two a line."""
    runs, common = comparison.runs, comparison.common_rates
    notes = [
        f"Base network: {format_percent(comparison.base_top1)} %. Best: of all candidates within "
        f"the budget, as the search scored them{_has_policy(runs)}."
    ]
    if 0 < comparison.images < comparison.base_images:
        notes.append(
            f"Candidates were scored on {comparison.images:,} images, the base network on all "
            f"{comparison.base_images:,}: compare the runs with each other."
        )
    if common != comparison.rates:
        over = ", ".join(f"{rate:.2f}" for rate in common) or "none"
        notes.append(f"The means are over the rates that every run has: {over}.")
    if len({run.asked for run in runs}) > 1:
        notes.append("The runs were granted different numbers of evaluations.")
    for run in runs:
        if not run.is_finished:
            done = f"{run.evaluations:,} of {run.asked:,} evaluations"
            notes.append(f"{run.label} has not ended: {done}; go on with --resume.")
    known = [f"{run.label} {run.known:,}" for run in runs if run.known]
    if known:
        notes.append(
            f"Answered by what another run had measured: {', '.join(known)}. These evaluations "
            "count and took no time."
        )
    errors = [
        f"{rate:.2f}: {100 * error:.2f}" for rate, error in comparison.standard_errors.items()
    ]
    if errors:
        notes.append(
            "Binomial standard error of the difference of two runs, in points: "
            f"{', '.join(errors)} ({comparison.images:,} images). It takes the images of the two "
            "for different ones; they are the same, so the error is smaller, but not known: "
            "records do not say which images were right."
        )
    return notes


def _has_policy(runs: Sequence[ComparedRun]) -> str:
    has = any(run.policy_top1 for run in runs)
    return "; policy: what it answers by itself" if has else ""


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
