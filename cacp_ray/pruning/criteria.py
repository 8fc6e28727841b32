"""Importance orders: a permutation of each group's channels, best first.

A new criterion is one function (plan, tensors, statistics, seed) -> orders, one line in CRITERIA.
"""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.errors import ConfigError, nearest_names
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics, regularized

Tensors = Mapping[str, Tensor]
Criterion = Callable[[Plan, Tensors, Statistics, int], list[NDArray[np.int64]]]


def rank_channels(
    criterion: str, plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """Importance order of every group.

    Args:
        criterion: A key of CRITERIA.
        plan: Of the network.
        tensors: Its state dict.
        statistics: Of calibration images; only `cap` reads them.
        seed: Only `random` reads it.

    Returns:
        Per group a permutation (C,) int64, best channel first.
    """
    return get_criterion(criterion)(plan, tensors, statistics, seed)


def get_criterion(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}: {nearest_names(name, CRITERIA)}")
    return CRITERIA[name]


def _sum_filters(
    plan: Plan, tensors: Tensors, norm: Callable[[Tensor], Tensor]
) -> list[NDArray[np.int64]]:
    """Sums norm(filter) over every filter that produces a channel of the group."""
    scores = [np.zeros(group.num_channels) for group in plan.groups]
    for (name, dim), axis in plan.axes.items():
        if dim == 0 and tensors[name].ndim > 1:
            values = norm(tensors[name].flatten(1).double()).numpy()  # (C_out,)
            for g in set(axis.group.tolist()) - {-1}:
                at = axis.group == g
                np.add.at(scores[g], axis.channel[at], values[at])
    return [np.argsort(-score, kind="stable") for score in scores]


def rank_l1(
    plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """L1 norm of the filters that make a channel (Li et al., 2017), summed over coupled layers."""
    return _sum_filters(plan, tensors, lambda rows: rows.abs().sum(1))


def rank_l2(
    plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """L2 norm of the filters that make a channel, summed over coupled layers."""
    return _sum_filters(plan, tensors, lambda rows: rows.norm(dim=1))


def rank_bn_scale(
    plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """|gamma| of the BN layers on a channel (network slimming, Liu et al., 2017), summed.

    Groups without BN fall back to the L1 order.
    """
    fallback = rank_l1(plan, tensors, statistics, seed)
    orders = []
    for g, group in enumerate(plan.groups):
        score = np.zeros(group.num_channels)
        for (name, _), axis in plan.axes.items():
            is_norm = f"{name.rpartition('.')[0]}.running_mean" in tensors
            if is_norm and name.endswith(".weight"):
                at = axis.group == g
                np.add.at(score, axis.channel[at], tensors[name].abs().double().numpy()[at])
        orders.append(np.argsort(-score, kind="stable") if score.any() else fallback[g])
    return orders


def rank_random(
    plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """A random permutation: the baseline that a criterion must beat."""
    rng = np.random.default_rng(seed)
    return [rng.permutation(group.num_channels) for group in plan.groups]


def rank_cap(
    plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """Greedy forward selection by explained output energy after optimal compensation.

    Starting from no channel, append the one whose inputs to the consuming layers explain most of
    the output energy that is still unexplained. With S the Schur complement of the input covariance
    given the chosen channels and G = S W^T, a channel t scores tr(G_t^T S_tt^-1 G_t).

    Source: after CaP (arXiv 2108.13728, as in its authors' code). Ours: several consumers add up,
    each as a share of its total output energy; the ridge of the compensation.
    """
    orders = []
    for g, group in enumerate(plan.groups):
        problems = []
        for consumer in plan.consumers:
            axis = plan.axes[consumer.weight, 1]
            weight = tensors[consumer.weight].double()
            taps = weight[0, 0].numel()
            positions = np.flatnonzero(axis.group == g)
            if len(positions) == 0:
                continue
            # Rows of one channel together: (C, rows a channel).
            positions = positions[np.argsort(axis.channel[positions], kind="stable")]
            rows = (positions[:, None] * taps + np.arange(taps)).reshape(group.num_channels, -1)
            flat = torch.from_numpy(rows.ravel())
            covariance = torch.from_numpy(statistics.inputs[consumer.weight].covariance)[flat][
                :, flat
            ]
            problems.append(_Selection(covariance, weight.flatten(1)[:, flat], rows.shape[1]))
        orders.append(_select(problems, group.num_channels))
    fallback = rank_l1(plan, tensors, statistics, seed)
    return [order if len(order) else other for order, other in zip(orders, fallback, strict=True)]


class _Selection:
    """The state of one consumer: S (D, D), G (D, N), in blocks of `block` rows a channel."""

    def __init__(self, covariance: Tensor, weight: Tensor, block: int) -> None:
        self.schur = regularized(covariance)
        self.cross = self.schur @ weight.T
        self.energy = float((self.cross * weight.T).sum()) + 1e-30
        self.block = block
        self.channels = torch.arange(len(covariance)).reshape(-1, block)

    def scores(self) -> Tensor:
        """(C,) newly explained share of the output energy."""
        rows = self.channels
        diagonal = self.schur[rows[:, :, None], rows[:, None, :]]  # (C, b, b)
        factor = torch.linalg.cholesky(diagonal)
        solved = torch.linalg.solve_triangular(factor, self.cross[rows], upper=False)  # (C, b, N)
        return solved.square().sum((1, 2)) / self.energy

    def choose(self, channel: int) -> None:
        """Removes from S and G what the channel explains; chosen rows keep a unit block."""
        rows = self.channels[channel]
        factor = torch.linalg.cholesky(self.schur[rows][:, rows])
        column = torch.linalg.solve_triangular(factor, self.schur[rows], upper=False)  # (b, D)
        solved = torch.linalg.solve_triangular(factor, self.cross[rows], upper=False)  # (b, N)
        self.cross -= column.T @ solved
        self.schur -= column.T @ column
        self.cross[rows] = 0
        self.schur[rows] = 0
        self.schur[:, rows] = 0
        self.schur[rows, rows] = 1


def _select(problems: list[_Selection], num_channels: int) -> NDArray[np.int64]:
    if not problems:
        return np.empty(0, dtype=np.int64)
    chosen: list[int] = []
    taken = torch.zeros(num_channels, dtype=torch.bool)
    for _ in range(num_channels):
        score = torch.stack([problem.scores() for problem in problems]).sum(0)
        best = int(score.masked_fill(taken, -1.0).argmax())
        chosen.append(best)
        taken[best] = True
        for problem in problems:
            problem.choose(best)
    return np.array(chosen, dtype=np.int64)


CRITERIA: dict[str, Criterion] = {
    "cap": rank_cap,
    "l1": rank_l1,
    "l2": rank_l2,
    "bn_scale": rank_bn_scale,
    "random": rank_random,
}
