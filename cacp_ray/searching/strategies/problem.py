"""The search as a strategy sees it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.allocation import Prior
from cacp_ray.searching.budget import Budget, Ints

Scores = list[NDArray[np.float64]]


def _no_scores(criterion: str) -> Scores:
    raise ValueError(f"no scores of {criterion} here")


@dataclass(frozen=True)
class Problem:
    """One search.

    Attributes:
        cost_model: Cost model of the whole network.
        budget: Keep counts that a rate allows.
        rates: Shares of the cost that are kept, rising, each reachable.
        seed: Seed of all that is random in a strategy.
        evaluations: Distinct candidates that may be measured, over all rates.
        prior: Allocation that strategies of offsets start from.
        scores: Criterion -> importance, one (C,) array a group, higher is more important; an empty
            name is the run's own criterion.
    """

    cost_model: CostModel
    budget: Budget
    rates: Sequence[float]
    seed: int
    evaluations: int
    prior: Prior
    scores: Callable[[str], Scores] = _no_scores

    @cached_property
    def prunable(self) -> Ints:
        """(P,) groups that may be cut, in forward order."""
        return np.flatnonzero(self.budget.min_counts < self.budget.num_channels)

    def check_evaluations(self, name: str, per_rate: int) -> None:
        """Refuses a search that would end before every rate has `per_rate` candidates.

        Raises:
            ConfigError: Too few evaluations for the strategy of this name.
        """
        enough = per_rate * len(self.rates)
        if self.evaluations < enough:
            raise ConfigError(
                f"strategy {name} measures {per_rate} candidates at every rate: raise evaluations "
                f"to {enough}, or choose another"
            )
