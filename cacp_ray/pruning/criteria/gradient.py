"""Criteria that read the loss's derivatives by a gate on each channel (`Statistics.gates`)."""

import numpy as np

from cacp_ray.pruning.cost import freed_by_one_channel
from cacp_ray.pruning.criteria.common import Scores, Tensors, fill, is_read
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import Statistics


def score_taylor(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Mean |dL_n/dm| over images: first-order change of the loss when the channel is cut.

    Scores are comparable across groups by the paper's rescaling: the scores of a group have L2
    norm 1. A group without gates takes its L1 scores, scaled to the mean of the others.

    Source: Molchanov et al., Pruning CNNs for Resource Efficient Inference (ICLR 2017), eq. 6-8.
    Ours: coupled layers share one gate, so that their gradients add up before the absolute value.
    """
    scores = [
        gate.absolute / max(float(np.linalg.norm(gate.absolute)), 1e-300)
        for gate in statistics.gates
    ]
    return fill(scores, is_read(plan), plan, tensors)


def score_group_fisher(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Mean (dL_n/dm)^2 over images, divided by the MACs that cutting one channel frees; one-shot.

    Scores are comparable across groups. All channels of a group free the same MACs, so the division
    matters across groups only. A group without gates takes its L1 scores, scaled to the mean of the
    others. Channels are ranked once, on the whole network; the paper cuts one channel after another
    and collects gradients anew while it trains.

    Source: Liu et al., Group Fisher Pruning (ICML 2021), eq. 5-8. The paper divides by activation
    memory (76.42 top-1 of ResNet-50 at 2.04 G) or by FLOPs (76.20; 74.93 without division); a plan
    knows the MACs exactly, but not the memory of every layer. Ours: the MACs are those of the whole
    network, where the paper follows them while it cuts.
    """
    freed = freed_by_one_channel(plan.macs, plan.cost_model.num_channels)
    scores = [gate.square / cost for gate, cost in zip(statistics.gates, freed, strict=True)]
    return fill(scores, is_read(plan), plan, tensors)
