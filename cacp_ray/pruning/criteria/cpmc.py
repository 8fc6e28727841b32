"""CPMC: weight, computation and parameters of all that vanishes with a channel."""

from cacp_ray.pruning.cost import freed_by_one_channel
from cacp_ray.pruning.criteria.common import Scores, Tensors, add, slices, zeros
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics

# Cut at one threshold, ResNet-20 (CIFAR-10) scored best near these exponents, and higher than with
# any weighted difference M - a F - b P that was tried.
COMPUTATION = 0.25
PARAMETERS = 0.5


def score_cpmc(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """M / (F^COMPUTATION * P^PARAMETERS), each divided by its largest value in the network.

    M is the sum of |weight| over the filters that make the channel and over the slices of the
    weights that read it. F and P are the MACs and parameters that vanish with the channel; all
    channels of a group have the same. Scores are comparable across groups.

    Source: after CPMC (IJCNN 2021, arXiv 2011.03240), from its abstract: the three criteria, the
    slice of the next layer (weight dependency) and the global normalisation. Ours: the product and
    its exponents, and every layer that reads the channel where the paper has the next one.
    """
    weight = zeros(plan)
    for rows, axis, _ in slices(plan, tensors):
        add(weight, axis, rows.abs().sum(1).numpy())
    largest = max(score.max() for score in weight) or 1.0
    whole = plan.cost_model.num_channels
    macs, params = (freed_by_one_channel(cost, whole) for cost in (plan.macs, plan.params))
    cost = (macs / macs.max()) ** COMPUTATION * (params / params.max()) ** PARAMETERS
    return [score / largest / share for score, share in zip(weight, cost, strict=True)]
