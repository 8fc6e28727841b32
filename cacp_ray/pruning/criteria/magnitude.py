"""Criteria that read the weights alone, and the random order that all must beat."""

import numpy as np
from torch import Tensor

from cacp_ray.pruning.criteria.common import Scores, Tensors, add, fill, slices, weight_norms, zeros
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.torch_types import row_norms


def score_l1(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """L1 norm of the filters that make a channel, summed over coupled layers.

    Scores are not comparable across groups: layers differ in scale.

    Source: Li et al., Pruning Filters for Efficient ConvNets (ICLR 2017). The sum is ours.
    """
    return weight_norms(plan, tensors, lambda rows: rows.abs().sum(1))


def score_l2(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """L2 norm of the filters that make a channel, summed over coupled layers.

    Scores are not comparable across groups. The source is that of `score_l1`, with another norm.
    """
    return weight_norms(plan, tensors, row_norms)


def score_fpgm(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Sum of a filter's distances to all other filters of its layer: least near their median.

    Scores are not comparable across groups.

    Source: He et al., Filter Pruning via Geometric Median (CVPR 2019), eq. 4-6. Ours: the distances
    of each layer are divided by their mean, then summed over coupled layers.
    """
    scores, known = zeros(plan), np.zeros(len(plan.groups), dtype=np.bool_)
    for rows, axis, is_filter in slices(plan, tensors):
        if is_filter:
            known[list(axis.groups)] = True
            distance = _sum_distances(rows)
            add(scores, axis, (distance / distance.mean().clamp(min=1e-30)).numpy())
    return fill(scores, known, plan, tensors)


def _sum_distances(rows: Tensor) -> Tensor:
    """(C,) sum of the Euclidean distances of each row of (C, D) to all others."""
    norms = rows.square().sum(1)
    squares = norms[:, None] + norms[None, :] - 2 * rows @ rows.T
    return squares.clamp(min=0).sqrt().fill_diagonal_(0).sum(1)


def score_bn_scale(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """|gamma| of the BN layers on a channel, their mean where there are several.

    Scores are comparable across groups, as in the paper, which cuts all layers at one threshold. A
    group without BN takes its L1 scores, scaled to the mean of the others.

    Source: Liu et al., Network Slimming (ICCV 2017), without its sparsity training. The mean is
    ours.
    """
    scores, counts = zeros(plan), zeros(plan)
    for (name, _), axis in plan.axes.items():
        is_norm = f"{name.rpartition('.')[0]}.running_mean" in tensors
        if is_norm and name.endswith(".weight"):
            add(scores, axis, tensors[name].abs().double().numpy())
            add(counts, axis, np.ones(len(axis.group)))
    means = [score / np.maximum(count, 1) for score, count in zip(scores, counts, strict=True)]
    known = np.array([count.any() for count in counts])
    return fill(means, known, plan, tensors)


def score_random(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Evenly spaced scores in random order: the baseline that a criterion must beat.

    One threshold for all groups cuts equal shares.
    """
    rng = np.random.default_rng(seed)
    scores = zeros(plan)
    for score in scores:
        order = rng.permutation(len(score))
        score[order] = 1 - np.arange(len(score)) / len(score)
    return scores
