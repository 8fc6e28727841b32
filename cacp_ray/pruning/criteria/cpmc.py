"""CPMC: the weight of all that vanishes with a channel."""

from cacp_ray.pruning.criteria.common import Scores, Tensors, add, slices, zeros
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics


def score_cpmc(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Sum of |weight| that vanishes with a channel, relative to the mean channel of its group.

    The sum goes over the filters that make the channel and over the slices of the weights that read
    it. Scores are comparable across groups.

    Source: after CPMC (IJCNN 2021, arXiv 2011.03240), from its abstract, which names three criteria
    (weight, computation, parameters), the slices of the next layer (weight dependency) and a global
    normalisation. Ours: every layer that reads the channel where the paper has the next one, and
    the normalisation, by group. All channels of a group free the same computation and parameters,
    so under that normalisation these two say nothing. As divisors across groups they did harm
    at every exponent that was tried, 0.05 to 1: they starve residual streams, whose channels
    free most (docs/criteria.md).
    """
    weight = zeros(plan)
    for rows, axis, _ in slices(plan, tensors):
        add(weight, axis, rows.abs().sum(1).numpy())
    return [score / max(float(score.mean()), 1e-300) for score in weight]
