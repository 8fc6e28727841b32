"""How the agent learned: the lines of `learning.jsonl`, and the small figures made from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.figures import (
    BLUE,
    ORANGE,
    Drawing,
    Plot,
    Save,
    limit_y,
    rate_colours,
    rate_legend,
    save_figure,
    save_plots,
    style,
)
from cacp_ray.reporting.summary import metric_of, sentence

REWARD_WINDOW = 10  # the reward of a rate is the mean of its last candidates
HEIGHT = 3.3

Line = dict[str, Any]


def draw_learning(
    result: dict[str, Any], lines: Sequence[Line], folder: Path, save: Save = save_figure
) -> list[Drawing]:
    """Writes the PNG and SVG files of the agent's learning; none without lines."""
    if not lines:
        return []
    learning, metric = result.get("learning") or {}, metric_of(result)
    points, images = learning.get("policy_score") or [], learning.get("images")
    plots: list[tuple[str, str, Plot]] = [
        ("learning-reward", "Reward", lambda axes: plot_reward(axes, lines, images, metric)),
        ("learning-critic", "Loss of the critics", lambda axes: plot_critic(axes, lines, metric)),
        ("learning-noise", "Exploration", lambda axes: plot_noise(axes, lines)),
    ]
    if points:
        title = "The policy alone, without search"
        plots.insert(
            1, ("learning-policy", title, lambda axes: plot_policy(axes, lines, points, metric))
        )
    return save_plots(plots, folder, HEIGHT, save)


def plot_reward(axes: Axes, lines: Sequence[Line], images: int | None, metric: Metric) -> str:
    """Plots the running mean of the reward of every rate; returns the caption."""
    shown: list[NDArray[np.float64]] = []
    for rate, colour in _colours(lines).items():
        if rate in lines[-1]["reward"]:
            steps, values = _series(lines, "reward", rate)
            axes.plot(steps, metric.scale * values, color=colour, label=rate, **_marker(steps))
            shown.append(metric.scale * values)
    limit_y(axes, np.concatenate(shown), np.empty(0), metric)
    _finish(axes, metric.axis, lines)
    rate_legend(axes)
    where = " on the search split" if metric.is_share else ""
    if images is not None:
        where = f" on {images:,} images of the search split"
    return (
        f"Mean {metric.name}{where} of the last {REWARD_WINDOW} candidates that were proposed for "
        "the rate."
    )


def plot_policy(
    axes: Axes, lines: Sequence[Line], points: Sequence[dict[str, Any]], metric: Metric
) -> str:
    """Plots the score of the policy's own answers while it learns; returns the caption."""
    shown: list[NDArray[np.float64]] = []
    for rate, colour in _colours(lines).items():
        own = [point for point in points if format_rate(point["rate"]) == rate]
        if own:
            steps = [point["evaluations"] for point in own]
            values = metric.scale * np.array([point["score"] for point in own])
            look = {"linestyle": "-" if own[0]["seen"] else "--", "color": colour, "label": rate}
            axes.plot(steps, values, marker="o", markersize=3, **look)
            shown.append(values)
    limit_y(axes, np.concatenate(shown), np.empty(0), metric)
    _finish(axes, metric.axis, lines)
    rate_legend(axes)
    images = max(point["images"] for point in points)
    unseen = " Dashed: rates that are not searched." if not all(p["seen"] for p in points) else ""
    return (
        f"{sentence(metric.name)} of the policy's answer at that moment, measured after the "
        f"search on the first {images:,} images of the search split; no choice depends on it."
        f"{unseen}"
    )


def plot_critic(axes: Axes, lines: Sequence[Line], metric: Metric) -> str:
    """Plots the loss of the critics; returns the caption."""
    steps, values = _series(lines, "critic_loss")
    axes.plot(steps, values, color=BLUE, **_marker(steps))
    if len(values):
        axes.set_ylim(0, 1.08 * values.max() or 1)
    _finish(axes, "squared error", lines)
    return (
        "Squared error of the critics on the episodes that they learn from: mean since the "
        f"previous point, in the agent's scale of returns. It needs no scored {metric.example}s."
    )


def plot_noise(axes: Axes, lines: Sequence[Line]) -> str:
    """Plots the noise of each rate and the share of known proposals; returns the caption."""
    for rate in sorted(lines[-1]["noise"]):
        steps, values = _series(lines, "noise", rate)
        axes.plot(steps, values, color=BLUE, linewidth=1.2, **_marker(steps))
    axes.set_ylim(bottom=0)
    _finish(axes, "noise of actions", lines)
    axes.yaxis.label.set_color(BLUE)
    right = axes.twinx()
    steps, values = _series(lines, "cached_share")
    right.plot(steps, 100 * values, color=ORANGE, linestyle="-.", **_marker(steps))
    right.set_ylim(0, max(5.0, 110 * values.max(initial=0)))
    right.set_ylabel("answered from memory (%)", fontsize=11, color=ORANGE)
    right.tick_params(labelsize=10)
    right.spines["top"].set_visible(False)
    return (
        "Solid: standard deviation of the noise on actions, one line for each rate. Dash-dotted: "
        "share of all proposals so far that were measured before, and so cost nothing."
    )


def _series(
    lines: Sequence[Line], name: str, rate: str | None = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Evaluations (N,) and values (N,) of the lines that have the value."""
    values = [line[name] if rate is None else line[name][rate] for line in lines]
    steps = [line["evaluations"] for line in lines]
    known = [pair for pair in zip(steps, values, strict=True) if pair[1] is not None]
    return np.array([n for n, _ in known], np.int64), np.array([v for _, v in known], np.float64)


def _marker(steps: NDArray[np.int64]) -> dict[str, Any]:
    """A marker where there is only one point, which would make no line."""
    return {"marker": "o"} if len(steps) == 1 else {}


def _colours(lines: Sequence[Line]) -> dict[str, NDArray[np.float64]]:
    """The colour of each rate that is searched or asked for, the same in all of these figures."""
    rates = sorted({*lines[-1]["reward"], *lines[-1]["policy"]})
    return dict(zip(rates, rate_colours(len(rates)), strict=True))


def _finish(axes: Axes, y_label: str, lines: Sequence[Line]) -> None:
    style(axes, "measured candidates", y_label)
    axes.set_xlim(0, 1.02 * lines[-1]["evaluations"])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
