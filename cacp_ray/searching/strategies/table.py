"""Strategies that need no Ray: how each is made from a problem."""

from collections.abc import Callable

from cacp_ray.errors import ConfigError, nearest_names
from cacp_ray.searching.strategies import adapruner, cpmc
from cacp_ray.searching.strategies.adapruner import make_adapruner
from cacp_ray.searching.strategies.cap import make_cap
from cacp_ray.searching.strategies.cem import CEM
from cacp_ray.searching.strategies.cpmc import make_cpmc
from cacp_ray.searching.strategies.evolution import Evolution
from cacp_ray.searching.strategies.global_ranking import make_global
from cacp_ray.searching.strategies.greedy import make_greedy
from cacp_ray.searching.strategies.hill_climb import HillClimb
from cacp_ray.searching.strategies.optuna_tpe import OptunaTPE
from cacp_ray.searching.strategies.pcp import make_pcp
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.random import RandomStrategy
from cacp_ray.searching.strategies.sensitivity import make_sensitivity
from cacp_ray.searching.strategies.uniform import UniformStrategy
from cacp_ray.searching.strategy import Strategy

MAKERS: dict[str, Callable[[Problem], Strategy]] = {
    "hill_climb": HillClimb,
    "cem": CEM,
    "noise": lambda p: CEM(p, learn=False),
    "evolution": Evolution,
    "optuna": OptunaTPE,
    "random": lambda p: RandomStrategy(p.budget, p.rates, p.seed),
    "uniform": lambda p: UniformStrategy(p.cost_model, p.budget, p.rates),
    "pcp": make_pcp,
    "greedy": make_greedy,
    "cap": make_cap,
    "cpmc": make_cpmc,
    "adapruner": make_adapruner,
    "global": make_global,
    "sensitivity": make_sensitivity,
}
# Criteria that a strategy's candidates name in addition to the run's own.
OTHER_ORDERS: dict[str, tuple[str, ...]] = {"cpmc": cpmc.ORDERS, "adapruner": adapruner.ORDERS}


def make_strategy(name: str, problem: Problem) -> Strategy:
    """A fresh strategy.

    Args:
        name: A key of MAKERS, or `package.module:function`, called with the problem.
        problem: The search; only strategies in FROM_A_PRIOR use its prior.

    Raises:
        ConfigError: There is no such strategy, or it needs more evaluations.
    """
    if ":" in name:
        from cacp_ray.models.factory import import_function

        return import_function("strategy", name, "problem")(problem)
    if name not in MAKERS:
        raise ConfigError(f"strategy {name}: {nearest_names(name, MAKERS)}")
    return MAKERS[name](problem)
