"""Strategies that need no Ray, by name."""

from collections.abc import Callable, Sequence

from cacp_ray.errors import ConfigError, nearest_names
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget
from cacp_ray.searching.strategies.random import RandomStrategy
from cacp_ray.searching.strategies.uniform import UniformStrategy
from cacp_ray.searching.strategy import Strategy

Factory = Callable[[CostModel, Budget, Sequence[float], int], Strategy]

STRATEGIES: dict[str, Factory] = {
    "random": lambda cost_model, budget, rates, seed: RandomStrategy(budget, rates, seed),
    "uniform": lambda cost_model, budget, rates, seed: UniformStrategy(cost_model, budget, rates),
}


def make_strategy(
    name: str, *, cost_model: CostModel, budget: Budget, rates: Sequence[float], seed: int
) -> Strategy:
    """A fresh strategy.

    Args:
        name: `random` or `uniform`.
        cost_model: Of the whole network.
        budget: Which keep counts a rate allows.
        rates: Share of the cost that is kept, each reachable.
        seed: Of all that is random in it.

    Raises:
        ConfigError: There is no such strategy.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy {name}: {nearest_names(name, STRATEGIES)}")
    return STRATEGIES[name](cost_model, budget, rates, seed)
