"""Strategies that need no Ray, by name."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacp_ray.errors import ConfigError, nearest_names
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget
from cacp_ray.searching.strategies.cem import CEM
from cacp_ray.searching.strategies.hill_climb import HillClimb
from cacp_ray.searching.strategies.random import RandomStrategy
from cacp_ray.searching.strategies.uniform import UniformStrategy
from cacp_ray.searching.strategy import Strategy

# Cost model, budget, rates, prior weights (G,), seed.
Factory = Callable[[CostModel, Budget, Sequence[float], NDArray[Any], int], Strategy]

STRATEGIES: dict[str, Factory] = {
    "random": lambda cost, budget, rates, prior, seed: RandomStrategy(budget, rates, seed),
    "uniform": lambda cost, budget, rates, prior, seed: UniformStrategy(cost, budget, rates),
    "hill_climb": lambda cost, budget, rates, prior, seed: HillClimb(budget, rates, prior, seed),
    "cem": lambda cost, budget, rates, prior, seed: CEM(budget, rates, prior, seed),
    "noise": lambda cost, budget, rates, prior, seed: CEM(budget, rates, prior, seed, learn=False),
}


def make_strategy(
    name: str,
    *,
    cost_model: CostModel,
    budget: Budget,
    rates: Sequence[float],
    seed: int,
    prior_weights: NDArray[Any] | None = None,
) -> Strategy:
    """A fresh strategy.

    Args:
        name: `random`, `uniform`, `hill_climb`, `cem`, or `noise`, a control: noise around the
            prior without learning.
        cost_model: Of the whole network.
        budget: Which keep counts a rate allows.
        rates: Share of the cost that is kept, each reachable.
        seed: Of all that is random in it.
        prior_weights: (G,) 1 for groups that share the cut in the prior, 0 for groups that stay
            whole; all share it by default. `random` and `uniform` have no prior.

    Raises:
        ConfigError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name}: {nearest_names(name, STRATEGIES)}")
    if prior_weights is None:
        prior_weights = np.ones(len(budget.num_channels))
    return STRATEGIES[name](cost_model, budget, rates, prior_weights, seed)
