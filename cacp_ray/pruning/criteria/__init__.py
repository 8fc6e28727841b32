"""Importance of channels: scores of every group, and the order that they make.

A criterion is a function (plan, state dict, statistics, seed) -> one (C,) array of scores for each
group; higher is more important. Its name is its key in CRITERIA, where `register` adds one, or
`package.module:function`. docs/criteria.md lists all criteria and shows how to write one.
"""

from collections.abc import Iterable
from typing import cast

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

KINDS = frozenset({"inputs", "gates"})  # kinds of statistics
CRITERIA: dict[str, tuple[Criterion, frozenset[str]]] = {  # with the kinds that each reads
    "cap": (score_cap, frozenset({"inputs"})),
    "l1": (score_l1, frozenset()),
    "l2": (score_l2, frozenset()),
    "fpgm": (score_fpgm, frozenset()),
    "bn_scale": (score_bn_scale, frozenset()),
    "cpmc": (score_cpmc, frozenset()),
    "taylor": (score_taylor, frozenset({"gates"})),
    "group_fisher": (score_group_fisher, frozenset({"gates"})),
    "random": (score_random, frozenset()),
}


def rank_channels(
    name: str, plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> list[NDArray[np.int64]]:
    """Importance order of every group: a permutation (C,), best channel first.

    Errors are those of `score_channels`.
    """
    scores = score_channels(name, plan, tensors, statistics, seed)
    return [np.argsort(-score, kind="stable") for score in scores]


def score_channels(
    name: str, plan: Plan, tensors: Tensors, statistics: Statistics, seed: int
) -> Scores:
    """Importance of every channel: (C,) float64 for each group, higher is more important.

    `statistics` hold the kinds that `needs(name)` names.

    Raises:
        ConfigError: The name is unknown, the statistics lack what the criterion reads, or it
            did not return scores.
    """
    for kind in sorted(needs(name)):
        # A network without consumers has no input moments: the criterion then falls back.
        if not getattr(statistics, kind) and (kind != "inputs" or plan.consumers):
            step = "give plan.calibrate a loss=" if kind == "gates" else "call plan.calibrate"
            raise ConfigError(
                f"criterion {name!r} reads statistics of training data ({kind}), which were not "
                f"collected: choose a criterion of the weights, such as l1, or {step}"
            )
    return _check_scores(name, plan, get_criterion(name)(plan, tensors, statistics, seed))


def _check_scores(name: str, plan: Plan, scores: object) -> Scores:
    """The scores as float64 arrays, if they have one finite number for each channel."""
    try:
        arrays = list(cast("Iterable[ArrayLike]", scores))
    except TypeError:
        arrays = []
    if len(arrays) != len(plan.groups):
        what = f"{len(arrays)} arrays" if arrays else f"a {type(scores).__name__}"
        raise ConfigError(
            f"criterion {name!r} returned {what}: it must return one array of scores for each of "
            f"the {len(plan.groups)} channel groups"
        )
    pairs = zip(plan.groups, arrays, strict=True)
    return [_check_group(name, group, score) for group, score in pairs]


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
        return import_function("criterion", name, "plan", "tensors", "statistics", "seed")
    if name not in CRITERIA:
        raise ConfigError(f"unknown criterion {name!r}: {nearest_names(name, CRITERIA)}")
    return CRITERIA[name][0]


def needs(name: str) -> frozenset[str]:
    """The kinds of `Statistics` that a criterion reads: a subset of {"inputs", "gates"}.

    A `package.module:function` may name them in its attribute `reads`; without it, it reads both.

    Raises:
        ConfigError: The name is unknown, or the function cannot be imported.
    """
    criterion = get_criterion(name)
    if name in CRITERIA:
        return CRITERIA[name][1]
    return _check_kinds(name, getattr(criterion, "reads", KINDS))


def register(name: str, criterion: Criterion, reads: frozenset[str] = frozenset()) -> None:
    """Adds a criterion of your own.

    Args:
        name: Name of the criterion; it replaces one of the same name.
        criterion: (plan, state dict, statistics, seed) -> one (C,) score array for each group.
        reads: Kinds of statistics that it reads, a subset of {"inputs", "gates"}.

    Raises:
        ConfigError: There is no such kind of statistics.
    """
    CRITERIA[name] = criterion, _check_kinds(name, reads)


def _check_kinds(name: str, reads: Iterable[str]) -> frozenset[str]:
    kinds = frozenset([reads] if isinstance(reads, str) else reads)
    if not kinds <= KINDS:
        raise ConfigError(
            f"criterion {name!r} reads {', '.join(sorted(kinds - KINDS))}: there are the "
            f"statistics {' and '.join(sorted(KINDS))}"
        )
    return kinds
