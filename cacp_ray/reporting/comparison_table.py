"""The table of a comparison, with notes in sentences below it."""

import dataclasses
from functools import partial
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.comparison import UNFINISHED, Comparison
from cacp_ray.reporting.stacks import Stack
from cacp_ray.reporting.summary import Column, format_seconds


def comparison_title(comparison: Comparison) -> str:
    """What the numbers of the table are."""
    split = " on the search split" if comparison.metric.is_share else ""
    return f"Before fine-tuning: {comparison.metric.heading}{split}, by rate (kept)"


def comparison_table(comparison: Comparison) -> RenderableType:
    """A table with a row for each run; columns that do not fit go into further tables below."""
    rows = [dataclasses.asdict(run) for run in comparison.runs]
    name, effort, blocks = comparison_columns(comparison)
    stack = Stack(comparison_title(comparison), [name], [effort, *blocks], rows)
    return Group(stack, "", Text("\n".join(comparison_notes(comparison))))


def comparison_columns(comparison: Comparison) -> tuple[Column, list[Column], list[list[Column]]]:
    """Columns of name, effort and accuracies; a row is a `ComparedRun` as a dict."""
    name = Column("run", "", lambda r: r["label"] + ("" if r["is_finished"] else f"\n{UNFINISHED}"))
    effort = [
        Column("rates", "", lambda row: row["searched"]),
        Column("evaluations", "", lambda row: f"{row['evaluations']:,}"),
        Column("search", "time", lambda row: format_seconds(row["seconds"])),
    ]
    blocks = [_accuracy_columns(comparison, "best", "search_score")]
    if any(run.policy_score for run in comparison.runs):
        blocks.append(_accuracy_columns(comparison, "policy", "policy_score"))
    return name, effort, blocks


def _accuracy_columns(comparison: Comparison, head: str, key: str) -> list[Column]:
    """Accuracy at each rate and the mean; blank where a run has no such rate, or no policy."""

    def cell(row: dict[str, Any], rate: float) -> str:
        return comparison.metric.format(row[key][rate]) if rate in row[key] else ""

    def mean(row: dict[str, Any]) -> str:
        return comparison.metric.format(comparison.mean(row[key])) if row[key] else ""

    columns = [
        Column(head, format_rate(rate), partial(cell, rate=rate)) for rate in comparison.rates
    ]
    return [*columns, Column(head, "mean", mean)]


def comparison_notes(comparison: Comparison) -> list[str]:
    """Notes below the table, a sentence or two in each line."""
    runs, common = comparison.runs, comparison.common_rates
    has_policy = any(run.policy_score for run in runs)
    notes = [
        f"Base network: {comparison.metric.describe(comparison.base_score)}. "
        "Best: of all candidates within the budget, as the search scored them"
        f"{'; policy: what it answers by itself' if has_policy else ''}."
    ]
    if 0 < comparison.images < comparison.base_images:
        notes.append(
            f"Candidates were scored on {comparison.images:,} images, the base network on all "
            f"{comparison.base_images:,}: compare the runs with each other."
        )
    if common != comparison.rates:
        over = ", ".join(format_rate(rate) for rate in common) or "none"
        notes.append(f"The means are over the rates that every run has: {over}.")
    if len({run.asked for run in runs}) > 1:
        notes.append("The runs were granted different numbers of evaluations.")
    for run in runs:
        if not run.is_finished:
            done = f"{run.evaluations:,} of {run.asked:,} evaluations"
            notes.append(f"{run.label} has not ended: {done}; go on with --resume.")
    if known := [f"{run.label} {run.known:,}" for run in runs if run.known]:
        notes.append(
            f"Answered by what another run had measured: {', '.join(known)}. These evaluations "
            "count and took no time."
        )
    standard_errors = comparison.standard_errors.items()
    if errors := [f"{format_rate(rate)}: {100 * error:.2f}" for rate, error in standard_errors]:
        notes.append(
            "Binomial standard error of the difference of two runs, in points: "
            f"{', '.join(errors)} ({comparison.images:,} images). It takes the images of the two "
            "for different ones; they are the same, so the error is smaller, but not known: "
            "records do not say which images were right."
        )
    return notes
