"""What the criteria share: their interface, the filters of a group, and the fallback."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.pruning.plan import Axis, Plan
from cacp_ray.pruning.statistics import Statistics

Tensors = Mapping[str, Tensor]
Scores = list[NDArray[np.float64]]
Criterion = Callable[[Plan, Tensors, Statistics, int], Scores]


def zeros(plan: Plan) -> Scores:
    """(C,) zeros for every group."""
    return [np.zeros(group.num_channels) for group in plan.groups]


def add(scores: Scores, axis: Axis, values: NDArray[np.float64]) -> None:
    """Adds a value a position of the axis, (size,), to the channel that lives there."""
    for g in set(axis.group.tolist()) - {-1}:
        at = axis.group == g
        np.add.at(scores[g], axis.channel[at], values[at])


def slices(plan: Plan, tensors: Tensors) -> Iterator[tuple[Tensor, Axis, bool]]:
    """Parts of weights that vanish with a channel, on either side of it.

    Yields:
        A weight's slices (size, ...) float64 along a dimension, that dimension's axis, and whether
        they are the filters that make its channels. Scales of one number a channel are left out.
    """
    for (name, dim), axis in plan.axes.items():
        if name in tensors and tensors[name].numel() > tensors[name].shape[dim]:
            rows = tensors[name].movedim(dim, 0).flatten(1).double()
            yield rows, axis, dim == output_dim(plan, name)


def output_dim(plan: Plan, name: str) -> int:
    """Dimension of a weight that holds its filters: 1 of a transposed convolution, else 0.

    A transposed convolution is known by its bias, or by the group of which it is the first
    producer: these follow dimension 1 of its weight.
    """
    module = name.rpartition(".")[0]
    rows, columns = plan.axes.get((name, 0)), plan.axes.get((name, 1))
    if columns is None:
        return 0
    bias = plan.axes.get((f"{module}.bias", 0))
    if bias is not None:
        return 0 if _same(bias, rows) or not _same(bias, columns) else 1
    made = {g for g, group in enumerate(plan.groups) if group.name == module}
    by_rows = rows is not None and bool(made & set(rows.group.tolist()))
    return int(not by_rows and bool(made & set(columns.group.tolist())))


def _same(first: Axis, second: Axis | None) -> bool:
    return (
        second is not None
        and np.array_equal(first.group, second.group)
        and np.array_equal(first.channel, second.channel)
    )


def weight_norms(plan: Plan, tensors: Tensors, norm: Callable[[Tensor], Tensor]) -> Scores:
    """Sum of norm(filter) over every filter that makes a channel.

    A group that no filter makes takes the slices of the weights that read it.
    """
    made, read = zeros(plan), zeros(plan)
    for rows, axis, is_filter in slices(plan, tensors):
        add(made if is_filter else read, axis, norm(rows).numpy())
    return [own if own.any() else other for own, other in zip(made, read, strict=True)]


def fill(scores: Scores, plan: Plan, tensors: Tensors) -> Scores:
    """Gives groups that a criterion says nothing of (all zero) their L1 scores.

    These are scaled so that their mean is that of all other channels: in a global ranking such a
    group is as good as the average one.
    """
    known = [score for score in scores if score.any()]
    if len(known) == len(scores):
        return scores
    mean = float(np.concatenate(known).mean()) if known else 1.0
    norms = weight_norms(plan, tensors, lambda rows: rows.abs().sum(1))
    return [
        score if score.any() else norm * (mean / max(norm.mean(), 1e-30))
        for score, norm in zip(scores, norms, strict=True)
    ]
