"""Several runs side by side as a table, and what it leaves open in sentences below."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacp_ray.reporting.comparison import UNFINISHED, ByRate, ComparedRun, Comparison
from cacp_ray.reporting.summary import Column, format_percent, format_seconds
from cacp_ray.reporting.tables import PLAIN_WIDTH

TITLE = "Before fine-tuning: top-1 in % on the search split, by rate (kept)"
MAX_NAME = 34  # columns; a longer path is folded


def comparison_table(comparison: Comparison, width: int = PLAIN_WIDTH) -> RenderableType:
    """A row a run; what does not fit `width` columns goes on in tables below, a row a run again."""
    rows = [dataclasses.asdict(run) for run in comparison.runs]
    title = TITLE
    name, effort, blocks = comparison_columns(comparison)
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
    return Group(*spaced, Text("\n".join(comparison_notes(comparison))))


def comparison_columns(comparison: Comparison) -> tuple[Column, list[Column], list[list[Column]]]:
    """Of a row a run, as `dataclasses.asdict` gives it: its name, its effort, its accuracies."""
    name = Column("run", "", lambda r: r["label"] + ("" if r["is_finished"] else f"\n{UNFINISHED}"))
    effort = [
        Column("rates", "", lambda row: row["searched"]),
        Column("evalua-", "tions", lambda row: f"{row['evaluations']:,}"),
        Column("search", "time", lambda row: format_seconds(row["seconds"])),
    ]
    blocks = [_accuracy_columns(comparison, "best", "search_top1")]
    if any(run.policy_top1 for run in comparison.runs):
        blocks.append(_accuracy_columns(comparison, "policy", "policy_top1"))
    return name, effort, blocks


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


def comparison_notes(comparison: Comparison) -> list[str]:
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
