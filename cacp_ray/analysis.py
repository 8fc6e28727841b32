"""`cacp_ray.analyze`: a network's channel groups, exact cost and small copies, without a search."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from cacp_ray.config import PruningConfig
from cacp_ray.loading import make_budget
from cacp_ray.pruning.cost import ChannelGroup
from cacp_ray.pruning.criteria import rank_channels
from cacp_ray.pruning.plan import Plan, make_plan
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.surgery import Slicer, build_subnet, reorder_weights
from cacp_ray.searching.budget import Budget, uniform


@dataclass(frozen=True)
class Analysis:
    """What can be cut from one network.

    Attributes:
        model: The network.
        plan: Its slicing plan.
        budget: Of its MACs.
    """

    model: nn.Module
    plan: Plan
    budget: Budget

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in the order of the forward pass."""
        return self.plan.groups

    @property
    def reachable(self) -> tuple[float, float]:
        """Smallest and largest rate (share of the MACs kept)."""
        return self.budget.smallest / self.budget.total, 1.0

    def cost(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """MACs of keep counts int (..., G) -> (...)."""
        return self.plan.macs(keep_counts)

    def uniform(self, rate: float) -> NDArray[np.int64]:
        """(G,) the same keep ratio in every group, within the budget of `rate` and using it up.

        Raises:
            InfeasibleRateError: The rate cannot be reached.
        """
        self.budget.check(rate)
        return uniform(self.budget, [rate], np.ones(len(self.groups)))[0]

    def build(
        self, keep_counts: Sequence[int] | NDArray[np.int64], criterion: str = "l1"
    ) -> nn.Module:
        """An independent small network that keeps the best channels by a weight-based criterion."""
        tensors = {name: value.detach() for name, value in self.model.state_dict().items()}
        orders = rank_channels(criterion, self.plan, tensors, Statistics(), seed=0)
        ordered = reorder_weights(self.plan, tensors, orders)
        cut = Slicer(self.plan)(ordered, [int(count) for count in keep_counts])
        return build_subnet(self.model, ordered | cut)


def analyze(model: nn.Module, example_input: Tensor, *, floor: float = 0.1) -> Analysis:
    """Finds the channel groups of a network.

    Args:
        model: Any CNN that runs on `example_input`; it is not changed.
        example_input: (1, C, H, W).
        floor: Smallest share of a group's channels that is kept, in (0, 1].

    Raises:
        UnsupportedModelError: It does not run, or nothing in it can be cut.
    """
    plan = make_plan(model, example_input)
    return Analysis(model, plan, make_budget(plan, "macs", PruningConfig(floor=floor)))
