"""Importance of channels: scores of every group, and the order that they make.

A criterion is one function (plan, state dict, statistics, seed) -> scores, one (C,) array a group,
higher is more important. `register` adds one; docs/criteria.md lists them all and shows how.
"""

import numpy as np
from numpy.typing import NDArray

from cacp_ray.errors import ConfigError, nearest_names
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
        name: A key of CRITERIA.
        plan: Of the network.
        tensors: Its state dict.
        statistics: Of calibration images; must hold the kinds of `needs(name)`.
        seed: Only `random` reads it.

    Returns:
        Per group (C,) float64, higher is more important.

    Raises:
        ConfigError: The name is unknown, or the statistics lack what the criterion reads.
    """
    for kind in sorted(needs(name)):
        # A network without consumers has no input moments: the criterion then falls back.
        if not getattr(statistics, kind) and (kind != "inputs" or plan.consumers):
            raise ConfigError(
                f"criterion {name!r} reads statistics of calibration images ({kind}), which were "
                "not collected: collect them, or choose a criterion of the weights, such as l1"
            )
    return get_criterion(name)(plan, tensors, statistics, seed)


def get_criterion(name: str) -> Criterion:
    """A criterion by name.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}: {nearest_names(name, CRITERIA)}")
    return CRITERIA[name]


def needs(name: str) -> frozenset[str]:
    """What a criterion reads of `Statistics`: a subset of {"inputs", "gates"}.

    Raises:
        ConfigError: The name is unknown.
    """
    get_criterion(name)
    return _NEEDS.get(name, frozenset())


def register(name: str, criterion: Criterion, reads: frozenset[str] = frozenset()) -> None:
    """Adds a criterion of your own, to be named like the others.

    Args:
        name: New, or replaces the criterion of that name.
        criterion: (plan, state dict, statistics, seed) -> one (C,) score array a group.
        reads: Kinds of statistics, a subset of {"inputs", "gates"}.
    """
    CRITERIA[name] = criterion
    _NEEDS[name] = reads
