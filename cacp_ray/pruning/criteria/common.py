"""The interface of criteria, the filters of a group, and the scores to fall back on."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics

Tensors = Mapping[str, Tensor]
Scores = list[NDArray[np.float64]]
Known = NDArray[np.bool_]  # (G,) whether a criterion could score a group
Criterion = Callable[[Plan, Tensors, Statistics, int], Scores]


def zeros(plan: Plan) -> Scores:
    """(C,) zeros for every group."""
    return [np.zeros(group.num_channels) for group in plan.groups]


def add(scores: Scores, axis: Axis, values: NDArray[np.float64]) -> None:
    """Adds the value (size,) at each position of an axis to the channel there."""
    for g in axis.groups:
        at = axis.group == g
        np.add.at(scores[g], axis.channel[at], values[at])  # pyright: ignore[reportUnknownArgumentType]


def slices(plan: Plan, tensors: Tensors) -> Iterator[tuple[Tensor, Axis, bool]]:
    """Yields parts of weights that vanish with a channel, on either side of it.

    Yields:
        A weight's float64 slices (size, ...) along a dimension, that dimension's axis, and whether
        the slices are the filters that make its channels. Tensors with one number for each channel
        are left out.
    """
    for (name, dim), axis in plan.axes.items():
        if name in tensors and tensors[name].numel() > tensors[name].shape[dim]:
            rows = tensors[name].movedim(dim, 0).flatten(1).double()
            yield rows, axis, dim == output_dim(plan, name)


def output_dim(plan: Plan, name: str) -> int:
    """The dimension of a weight that holds its filters: 1 in a transposed convolution, else 0.

    A transposed convolution is recognised by its bias, or by the group whose first producer it is:
    these follow dimension 1 of its weight.
    """
    module = name.rpartition(".")[0]
    rows, columns = plan.axes.get((name, 0)), plan.axes.get((name, 1))
    if columns is None:
        return 0
    bias = plan.axes.get((f"{module}.bias", 0))
    if bias is not None:
        return 0 if _same(bias, rows) or not _same(bias, columns) else 1
    made = {g for g, group in enumerate(plan.groups) if group.name == module}
    by_rows = rows is not None and bool(made & set(rows.groups))
    return int(not by_rows and bool(made & set(columns.groups)))


def _same(first: Axis, second: Axis | None) -> bool:
    return (
        second is not None
        and np.array_equal(first.group, second.group)
        and np.array_equal(first.channel, second.channel)
    )


def weight_norms(plan: Plan, tensors: Tensors, norm: Callable[[Tensor], Tensor]) -> Scores:
    """The sum of norm(filter) over every filter that makes a channel.

    A group that no filter makes takes slices of the weights that read it instead.
    """
    made, read = zeros(plan), zeros(plan)
    is_made = np.zeros(len(plan.groups), dtype=np.bool_)
    for rows, axis, is_filter in slices(plan, tensors):
        add(made if is_filter else read, axis, norm(rows).numpy())
        is_made[list(axis.groups)] |= is_filter
    return [made[g] if is_made[g] else read[g] for g in range(len(plan.groups))]


def is_read(plan: Plan) -> Known:
    """(G,) whether some layer mixes the group's channels."""
    known = np.zeros(len(plan.groups), dtype=np.bool_)
    for consumer in plan.consumers:
        known[list(plan.axes[consumer.weight, 1].groups)] = True
    return known


def fill(scores: Scores, known: Known, plan: Plan, tensors: Tensors) -> Scores:
    """Gives L1 scores to the groups that a criterion cannot score.

    They are scaled to the mean of all other channels, so that such a group is average in a global
    ranking. A group that is known keeps its scores, also where all of them are zero, as after
    training towards sparsity.
    """
    if known.all():
        return scores
    scored = [score for score, is_known in zip(scores, known, strict=True) if is_known]
    mean = float(np.concatenate(scored).mean()) if scored else 1.0
    norms = weight_norms(plan, tensors, lambda rows: rows.abs().sum(1))
    return [
        score if is_known else norm * (mean / max(norm.mean(), 1e-30))
        for score, is_known, norm in zip(scores, known, norms, strict=True)
    ]
