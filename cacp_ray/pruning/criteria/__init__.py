"""Importance of channels: scores of every group, and the order that they make.

A criterion is one function (plan, state dict, statistics, seed) -> scores, one (C,) array a group,
higher is more important. It is named by its key in CRITERIA, where `register` adds one, or by
`package.module:function`; docs/criteria.md lists them all and shows how to write one.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.errors import ConfigError, nearest_names
from cacp_ray.models.factory import import_function
from cacp_ray.pruning.cost import ChannelGroup
from cacp_ray.pruning.criteria.cap import score_cap
from cacp_ray.pruning.criteria.common import Criterion, Scores, Tensors
from cacp_ray.pruning.criteria.cpmc import score_cpmc
from cacp_ray.pruning.criteria.gradient import score_group_fisher, score_taylor
from cacp_ray.pruning.criteria.magnitude import (
    score_bn_scale,
    score_fpgm,
    score_l1,
    score_l2,
    score_random,
)
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics

CRITERIA: dict[str, Criterion] = {
    "cap": score_cap,
    "l1": score_l1,
    "l2": score_l2,
    "fpgm": score_fpgm,
    "bn_scale": score_bn_scale,
    "cpmc": score_cpmc,
    "taylor": score_taylor,
    "group_fisher": score_group_fisher,
    "random": score_random,
}
KINDS = frozenset({"inputs", "gates"})  # of statistics
_NEEDS = {
    "cap": frozenset({"inputs"}),
    "taylor": frozenset({"gates"}),
    "group_fisher": frozenset({"gates"}),
}


def rank_channels(
    name: str, plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """Importance order of every group: a permutation (C,) int64, best channel first.

    Arguments and errors are those of `score_channels`.
    """
    scores = score_channels(name, plan, tensors, statistics, seed)
    return [np.argsort(-score, kind="stable") for score in scores]


def score_channels(
    name: str, plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> Scores:
    """Importance of every channel.

    Args:
        name: A key of CRITERIA, or `package.module:function`.
        plan: Of the network.
        tensors: Its state dict.
        statistics: Of calibration images; must hold the kinds of `needs(name)`.
        seed: Only `random` reads it.

    Returns:
        Per group (C,) float64, higher is more important.

    Raises:
        ConfigError: The name is unknown, the statistics lack what the criterion reads, or it
            returned something else than scores.
    """
    for kind in sorted(needs(name)):
        # A network without consumers has no input moments: the criterion then falls back.
        if not getattr(statistics, kind) and (kind != "inputs" or plan.consumers):
            raise ConfigError(
                f"criterion {name!r} reads statistics of calibration images ({kind}), which were "
                "not collected: collect them, or choose a criterion of the weights, such as l1"
            )
    return _check_scores(name, plan, get_criterion(name)(plan, tensors, statistics, seed))


def _check_scores(name: str, plan: Plan, scores: object) -> Scores:
    """The scores as float64 arrays, if they are one finite number a channel."""
    try:
        found = list(scores)  # pyright: ignore[reportArgumentType]
    except TypeError:
        found = []
    if len(found) != len(plan.groups):
        what = f"{len(found)} arrays" if found else f"a {type(scores).__name__}"
        raise ConfigError(
            f"criterion {name!r} returned {what}: it must return one array of scores for each of "
            f"the {len(plan.groups)} channel groups"
        )
    return [
        _check_group(name, group, score) for group, score in zip(plan.groups, found, strict=True)
    ]


def _check_group(name: str, group: ChannelGroup, score: ArrayLike) -> NDArray[np.float64]:
    rule = f"it must return {group.num_channels} finite numbers, one for each channel"
    try:
        array = np.asarray(score, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a tensor with gradients
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"criterion {name!r}, group {group.name}: no array of numbers ({reason}): {rule}"
        ) from error
    if array.shape != (group.num_channels,):
        raise ConfigError(
            f"criterion {name!r}, group {group.name}: scores of shape {array.shape}: {rule}"
        )
    if not np.isfinite(array).all():
        raise ConfigError(f"criterion {name!r}, group {group.name}: NaN or infinity: {rule}")
    return array


def get_criterion(name: str) -> Criterion:
    """A criterion by name: a key of CRITERIA, or `package.module:function`.

    Raises:
        ConfigError: The name is unknown, or the function cannot be imported.
    """
    if name not in CRITERIA and ":" in name:
        return import_function("criterion", name)
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}: {nearest_names(name, CRITERIA)}")
    return CRITERIA[name]


def needs(name: str) -> frozenset[str]:
    """What a criterion reads of `Statistics`: a subset of {"inputs", "gates"}.

    Of `package.module:function` it is what the function's attribute `reads` says; both without it.

    Raises:
        ConfigError: The name is unknown, or the function cannot be imported.
    """
    criterion = get_criterion(name)
    if name in CRITERIA:
        return _NEEDS.get(name, frozenset())
    return _check_kinds(name, getattr(criterion, "reads", KINDS))


def register(name: str, criterion: Criterion, reads: frozenset[str] = frozenset()) -> None:
    """Adds a criterion of your own, to be named like the others.

    Args:
        name: New, or replaces the criterion of that name.
        criterion: (plan, state dict, statistics, seed) -> one (C,) score array a group.
        reads: Kinds of statistics, a subset of {"inputs", "gates"}.

    Raises:
        ConfigError: There is no such kind of statistics.
    """
    kinds = _check_kinds(name, reads)
    CRITERIA[name] = criterion
    _NEEDS[name] = kinds


def _check_kinds(name: str, reads: Iterable[str]) -> frozenset[str]:
    kinds = frozenset([reads] if isinstance(reads, str) else reads)
    if not kinds <= KINDS:
        raise ConfigError(
            f"criterion {name!r} reads {', '.join(sorted(kinds - KINDS))}: there are the "
            f"statistics {' and '.join(sorted(KINDS))}"
        )
    return kinds
