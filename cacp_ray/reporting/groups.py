"""Figures of channel groups: the channels that every rate keeps, and how much groups matter."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib.axes import Axes
from numpy.typing import NDArray

from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.figures import BLUE, GREY, rate_colours, style
from cacp_ray.reporting.summary import metric_of

MAX_CELLS_WITH_TEXT = 16
MAX_GROUP_LABELS = 30
RESAMPLES = 200
FOLDS = 5
MIN_R2 = 0.5  # on held-out candidates; a worse fit gets no figure
RIDGE = 1e-3
MAX_FITTED = 3000  # candidates, evenly spaced over the search


def plot_keep_ratios(axes: Axes, result: dict[str, Any]) -> str:
    """Plots the share of channels kept, a row for each rate; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: row["rate"])
    groups = result["groups"]
    num_channels = np.array([group["num_channels"] for group in groups])
    kept = np.array([row["keep_counts"] for row in rates]).reshape(len(rates), len(groups))
    ratios = 100 * kept / num_channels  # (R, G)
    image = axes.imshow(ratios, aspect="auto", cmap="viridis", vmin=0, vmax=100)
    axes.set_yticks(range(len(rates)), [format_rate(row["rate"]) for row in rates])
    left_out = _name_groups(axes, groups)
    if len(groups) <= MAX_CELLS_WITH_TEXT:
        for (r, g), ratio in np.ndenumerate(ratios):
            colour = "white" if ratio < 45 else "black"
            axes.text(g, r, f"{ratio:.0f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_ylabel("rate (kept)", fontsize=11)
    figure = axes.get_figure()
    assert figure is not None
    bar = figure.colorbar(image, ax=axes, location="top", aspect=40, pad=0.02)
    bar.set_label("channels kept (%)", fontsize=11)
    return f"A column is a channel group, in forward order; bold: residual streams.{left_out}"


def plot_keep_counts(axes: Axes, result: dict[str, Any]) -> str:
    """Plots the channels kept at every rate and in the whole network; returns the caption."""
    rates = sorted(result["rates"], key=lambda row: -row["rate"])
    groups = result["groups"]
    places = np.arange(len(groups))
    whole = [group["num_channels"] for group in groups]
    axes.bar(places, whole, width=0.9, color="#e5e7eb", label="whole")
    # The larger rates stand behind the smaller ones, except where a smaller one keeps more.
    colours = rate_colours(len(rates))[::-1]
    widths = np.linspace(0.8, 0.35, len(rates)) if len(rates) > 1 else [0.7]
    for row, colour, width in zip(rates, colours, widths, strict=True):
        axes.bar(
            places, row["keep_counts"], width=width, color=colour, label=format_rate(row["rate"])
        )
    style(axes, "", "channels")
    axes.set_axisbelow(True)
    left_out = _name_groups(axes, groups)
    axes.legend(fontsize=9, frameon=False, title="rate (kept)", loc="upper left")
    return f"Grey: channels of the whole network.{left_out}"


class GroupImportance(NamedTuple):
    """How much each group matters: what is lost where it keeps a tenth fewer channels."""

    lost: NDArray[np.float64]  # (G,), at the mean accuracy
    spread: NDArray[np.float64]  # (2, G), 5 and 95 % quantiles of `lost` over resampled candidates
    r2: float  # share of the variance of held-out candidates that the fit explains (5 folds)


def fit_importance(result: dict[str, Any], table: pa.Table) -> GroupImportance | None:
    """Estimates the importance of single groups by a linear fit to the scored candidates.

    The score, or the logit of a share, is fitted by the logarithms of all keep ratios (ridge
    regression). There is none where `r2` is under one half, or there are fewer than three
    candidates for each group.
    """
    if table.num_rows == 0 or "keep_counts" not in table.column_names:
        return None
    ok = np.flatnonzero(np.array(table["status"].to_pylist()) == "ok")
    if len(ok) > MAX_FITTED:
        ok = ok[np.linspace(0, len(ok) - 1, MAX_FITTED).astype(np.int64)]
    table = table.take(ok)
    counts, score = (
        np.array(table["keep_counts"].to_pylist(), np.float64),
        table["score"].to_numpy(),
    )
    whole = np.array([group["num_channels"] for group in result["groups"]])
    if len(counts) < 3 * len(whole):
        return None
    x = np.log(counts / whole)  # (N, G)
    is_share = metric_of(result).is_share
    y = np.log((score + 1e-3) / (1 - score + 1e-3)) if is_share else score
    rng = np.random.default_rng(0)
    fold = rng.permutation(len(y)) % FOLDS
    errors = np.zeros(len(y))
    for held in range(FOLDS):
        part = fold == held
        slope, offset = _fit(x[~part], y[~part])
        errors[part] = y[part] - x[part] @ slope - offset
    r2 = 1 - float(np.mean(errors**2)) / max(float(y.var()), 1e-12)
    if r2 < MIN_R2:
        return None
    mean = score.mean()
    points = -np.log(0.9) * (100 * mean * (1 - mean) if is_share else 1)  # for a slope of 1
    draws = [rng.integers(len(y), size=len(y)) for _ in range(RESAMPLES)]
    slopes = np.array([_fit(x[rows], y[rows])[0] for rows in draws])
    slope, _ = _fit(x, y)
    spread = points * np.quantile(slopes, [0.05, 0.95], axis=0)
    return GroupImportance(points * slope, spread, r2)


def plot_importance(axes: Axes, result: dict[str, Any], importance: GroupImportance) -> str:
    """Plots what a cut of each group costs in score; returns the caption."""
    groups, (lost, spread, r2) = result["groups"], importance
    errors = np.maximum([lost - spread[0], spread[1] - lost], 0)
    axes.bar(np.arange(len(groups)), lost, color=BLUE, width=0.75)
    axes.errorbar(np.arange(len(groups)), lost, errors, fmt="none", ecolor=GREY, elinewidth=1)
    axes.axhline(0, color="black", linewidth=0.6)
    metric = metric_of(result)
    style(axes, "", f"{metric.name} lost{' (points)' if metric.is_share else ''}")
    axes.set_axisbelow(True)
    left_out = _name_groups(axes, groups)
    return (
        f"{'Points of top-1' if metric.is_share else metric.name} lost where one group keeps a "
        "tenth fewer channels and all others stay: a linear fit to the candidates that the search "
        f"measured, which explains {100 * r2:.0f} % of the variance of candidates left out. "
        f"Lines: 90 % interval.{left_out}"
    )


def _fit(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Slopes (G,) and offset of a ridge regression."""
    centre, mean = x.mean(axis=0), float(y.mean())
    scaled = x - centre
    gram = scaled.T @ scaled + RIDGE * len(y) * np.eye(x.shape[1])
    slope = np.linalg.solve(gram, scaled.T @ (y - mean))
    return slope, mean - float(centre @ slope)


def _name_groups(axes: Axes, groups: list[dict[str, Any]]) -> str:
    """Writes the names of groups below the axes; returns a sentence if some are left out."""
    every = -(-len(groups) // MAX_GROUP_LABELS)
    ticks = range(0, len(groups), every)
    axes.set_xticks(ticks, [_shorten(groups[g]["name"]) for g in ticks], parse_math=False)
    size = 9 if len(groups) <= MAX_CELLS_WITH_TEXT else 7
    axes.tick_params(axis="x", labelrotation=90, labelsize=size)
    for g, label in zip(ticks, axes.get_xticklabels(), strict=True):
        label.set_fontweight("bold" if groups[g]["is_residual"] else "normal")
    return "" if every == 1 else f" One name in {every} is written."


def _shorten(name: str, length: int = 22) -> str:
    return name if len(name) <= length else "\N{HORIZONTAL ELLIPSIS}" + name[1 - length :]
