"""The result of agent tuning: a table, a figure for each setting, and a page with both."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.io.files import read_text
from cacp_ray.io.schema import Content, read_checked
from cacp_ray.reporting.figures import BLUE, GREY, ORANGE, Plot, limit_y, save_plots, style
from cacp_ray.reporting.html import write_page
from cacp_ray.reporting.stacks import Stack
from cacp_ray.reporting.summary import (
    Column,
    format_percent,
    format_seconds,
    format_setting,
    metric_of,
)
from cacp_ray.rundir.schema import TuningFile

HEIGHT = 3.0
LOG_FACTOR = 20.0  # an axis whose ends differ by more is logarithmic
SHOWN = 10  # number of trials on the terminal


def write_tuning_report(folder: Path) -> Path:
    """Writes `report.html` and the figures of a finished tuning.

    Raises:
        ArtifactError: result.json, config.yaml, best.yaml or environment.json is missing or
            unreadable, or there are no trials.
    """
    result = read_checked(folder / "result.json", TuningFile)
    importance, metric = rank_importance(result), metric_of(result)
    first = (
        "importance",
        "Which settings matter",
        lambda axes: plot_importance(axes, importance, metric),
    )
    plots: list[tuple[str, str, Plot]] = [first] if importance.values else []
    for key in result["start"]:
        plots.append((key, key, lambda axes, key=key: plot_setting(axes, result, key)))
    answers = result["answers"]
    known = 1 - answers["scored"] / max(1, sum(answers.values()))  # no evaluator had to score them
    return write_page(
        folder / "report.html",
        "tuning.html.jinja",
        result=result,
        metric=metric,
        header=tuning_header(result),
        rows=tuning_rows(result),
        num_stopped=sum(not row["is_whole"] for row in result["trials"]),
        share=format_percent(known, 0),
        seconds=format_seconds(sum(result["seconds"].values())),
        best=read_text(folder / "best.yaml"),
        best_path=(folder / "best.yaml").as_posix(),
        cache_path=(folder / "cache").as_posix(),
        config=read_text(folder / "config.yaml"),
        environment=read_checked(folder / "environment.json", Content),
        figures=save_plots(plots, folder / "figures", HEIGHT),
    )


def tuning_header(result: dict[str, Any]) -> list[str]:
    """Heads of the columns of `tuning_rows`."""
    settings = [key.partition(".")[2].replace("_", " ") for key in result["start"]]
    metric = metric_of(result)
    unit = " (%)" if metric.is_share else ""
    scores = f"best {metric.name}{unit}", f"mean over time{unit}"
    heads = ["trial", *scores, "evaluations", "known (%)"]
    return [*heads, *(["settings since"] if has_changed(result) else []), *settings]


def tuning_rows(result: dict[str, Any]) -> list[list[str]]:
    """Cells of every trial, the best first."""
    metric = metric_of(result)
    return [
        [
            row["name"].removeprefix("trial-") + (" (as it was)" * is_start(row, result)),
            metric.format(row["score"]),
            metric.format(row["area"]),
            f"{row['evaluations']:,}",
            "-" if row.get("known") is None else format_percent(row["known"], 0),  # none asked for
            *([f"{row['since']:,}"] if has_changed(result) else []),
            *(format_setting(row["settings"][key]) for key in result["start"]),
        ]
        for row in result["trials"]
    ]


def has_changed(result: dict[str, Any]) -> bool:
    """Whether the settings of a trial changed during its search."""
    return any(row.get("since", 0) for row in result["trials"])


def is_start(row: dict[str, Any], result: dict[str, Any]) -> bool:
    """Whether a trial had the settings of the search configuration."""
    return row["settings"] == result["start"]


def tuning_table(result: dict[str, Any]) -> Stack:
    """The best trials as a table for the terminal."""
    num = len(result["trials"])
    name = metric_of(result).name
    title = f"{result['name']}: {num} trials, {name} is the mean over rates and seeds"
    rows = [
        {"cells": cells}
        for index, (row, cells) in enumerate(
            zip(result["trials"], tuning_rows(result), strict=True)
        )
        if index < SHOWN or is_start(row, result)
    ]
    trial, *others = (
        Column(*_halve(head), lambda row, index=index: row["cells"][index])
        for index, head in enumerate(tuning_header(result))
    )
    return Stack(title, [trial], [[column] for column in others], rows)


def _halve(head: str) -> tuple[str, str]:
    """A head in two lines that are as short as its spaces allow; the second may be empty."""
    words = head.split(" ")
    cuts = [(" ".join(words[:i]), " ".join(words[i:])) for i in range(1, len(words) + 1)]
    return min(cuts, key=lambda lines: max(map(len, lines)))


@dataclass(frozen=True)
class Importance:
    """Correlation of the score with the settings, over the trials that reached the end."""

    values: dict[str, float]  # Spearman's rank correlation with the score, by numeric setting
    num_trials: int

    @property
    def chance(self) -> float:
        """Approximate bound that 95 % of settings without effect stay below."""
        return min(1.0, 1.96 / math.sqrt(self.num_trials - 1))


def rank_importance(result: dict[str, Any]) -> Importance:
    """Importance of the settings; empty for a population, whose trials change their settings."""
    rows = result["trials"]
    done = [row for row in rows if row["is_whole"]]
    y = np.array([row[result["objective"]] for row in done])
    correlations: dict[str, float] = {}
    for key in result["start"] if not has_changed(result) else ():
        values = [row["settings"][key] for row in done]
        if all(is_number(value) for value in values):
            correlation = rank_correlation(np.array(values, dtype=float), y)
            if correlation is not None:
                correlations[key] = correlation
    return Importance(correlations, len(done))


def is_number(value: Any) -> bool:
    """Whether a setting is a number, and so has an order."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def plot_importance(axes: Axes, importance: Importance, metric: Metric) -> str:
    """Plots rank correlations as bars, the strongest on top; returns the caption."""
    ranked = sorted(importance.values.items(), key=lambda item: abs(item[1]))
    axes.axvspan(-importance.chance, importance.chance, color=GREY, alpha=0.15, linewidth=0)
    axes.barh([key for key, _ in ranked], [value for _, value in ranked], color=BLUE, height=0.6)
    axes.set_xticks([-1, -0.5, 0, 0.5, 1])
    style(axes, f"rank correlation with {metric.name}", "")
    return (
        f"Over the {importance.num_trials} trials to the end: right of the middle, higher values "
        "are better. Within the grey, a setting that changes nothing would lie as well."
    )


def plot_setting(axes: Axes, result: dict[str, Any], key: str) -> str:
    """Plots the score of all trials against one setting; returns the caption."""
    rows, metric = result["trials"], metric_of(result)
    done = np.array([row["is_whole"] for row in rows])
    y = np.array([metric.scale * row[result["objective"]] for row in rows])
    values = [row["settings"][key] for row in rows]
    if all(is_number(value) for value in values):
        x = np.array(values, dtype=float)
        if x.min() > 0 and x.max() / x.min() > LOG_FACTOR:
            axes.set_xscale("log")
    else:
        names = sorted({format_setting(value) for value in values})
        x = np.array([names.index(format_setting(value)) for value in values], dtype=float)
        axes.set_xticks(range(len(names)), names)
    starts = np.array([is_start(row, result) for row in rows])
    axes.scatter(x[~done], y[~done], s=26, facecolors="none", edgecolors=GREY)
    axes.scatter(x[done], y[done], s=30, c=BLUE)
    axes.scatter(x[starts], y[starts], s=90, facecolors="none", edgecolors=ORANGE, linewidths=2)
    limit_y(axes, y[done], y, metric)
    style(axes, key, f"{metric.name} (%)" if metric.is_share else metric.name)
    hollow = " Hollow: stopped early." if not done.all() else ""
    return f"Dots: {done.sum()} trials to the end; ringed: as it was.{hollow}"


def rank_correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation, ties by mean rank; None where a side does not vary."""
    if len(x) < 3 or len(np.unique(x)) < 2 or len(np.unique(y)) < 2:
        return None
    return float(np.corrcoef(_ranks(x), _ranks(y))[0, 1])


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[inverse]
