"""The strategy of a run, from its configuration: agents on Ray, and all others."""

import logging
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.config import RunConfig
from cacp_ray.loading import Base, find_statistics
from cacp_ray.pruning.criteria import needs, score_channels
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.searching.allocation import Prior, uniform_prior
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.strategies import AGENTS, FROM_A_PRIOR, make_strategy
from cacp_ray.searching.strategies.prior import PriorFirst
from cacp_ray.searching.strategies.problem import Problem, Scores
from cacp_ray.searching.strategy import Strategy, Tick

logger = logging.getLogger(__name__)

CONDITIONAL = ("cacp", "cacp-paper")  # one policy for every rate


def make_run_strategy(
    config: RunConfig, base: Base, tick: Tick | None = None, run_dir: Path | None = None
) -> tuple[Strategy, Any]:
    """What proposes candidates in a run, and its conditional agent, if it is led by one.

    Args:
        config: Of the run.
        base: Of the run.
        tick: What the agent's `training_step` calls: one turn of the search loop.
        run_dir: Where statistics of the calibration images may be found.

    Raises:
        ConfigError: The strategy needs more evaluations.
    """
    cost_model, budget, rates = base.plan.cost_model, base.budget, config.rates
    name, seed, agent = config.strategy, config.seed, None
    if name in CONDITIONAL:
        agent = _build_agent(config, base)

    def make(prior: Prior) -> Any:
        if name in CONDITIONAL or name == "amc":
            mdp = AllocationMDP(cost_model, budget, prior, config.agent.action_scale)
            evaluations = num_searched(config)
            if agent is None:
                return _build_amc(config, mdp, evaluations)
            agent.attach(mdp, rates, seed, evaluations, tick)
            return agent
        return make_strategy(name, _make_problem(config, base, prior, run_dir))

    uniform = uniform_prior(len(budget.num_channels))
    is_paper = name in ("cacp-paper", "amc")
    if name == "cacp" or name in FROM_A_PRIOR or (is_paper and config.paper.prior):
        problem = _make_problem(config, base, uniform, run_dir)
        return PriorFirst(problem, make, name=name), agent
    return make(uniform), agent


def check_strategy(config: RunConfig, base: Base) -> None:
    """Refuses a strategy that cannot be made, before anything is written.

    Raises:
        ConfigError: It needs more evaluations, or something that is not installed.
    """
    if config.strategy not in AGENTS:
        prior = uniform_prior(len(base.budget.num_channels))
        make_strategy(config.strategy, _make_problem(config, base, prior, None))


def _make_problem(config: RunConfig, base: Base, prior: Prior, run_dir: Path | None) -> Problem:
    def scores(criterion: str) -> Scores:
        chosen = criterion or config.pruning.criterion
        statistics = find_statistics(base, config, run_dir) if needs(chosen) else Statistics()
        tensors = base.model.state_dict()
        return score_channels(chosen, base.plan, tensors, statistics, config.seed)

    return Problem(
        cost_model=base.plan.cost_model,
        budget=base.budget,
        rates=config.rates,
        seed=config.seed,
        evaluations=config.evaluations,
        prior=prior,
        scores=scores,
    )


def _build_agent(config: RunConfig, base: Base) -> Any:
    if config.strategy == "cacp-paper":
        from cacp_ray.agent.ddpg.algorithm import DDPGConfig

        _quieten_ray()
        return DDPGConfig().agent(config.paper, seed=config.seed).build_algo()
    from cacp_ray.agent.cacp.algorithm import CACPConfig

    _quieten_ray()
    num_actions = int(np.sum(base.budget.min_counts < base.budget.num_channels))
    settings = CACPConfig().agent(config.agent, seed=config.seed, num_actions=num_actions)
    return settings.build_algo()


def _build_amc(config: RunConfig, mdp: AllocationMDP, evaluations: int) -> Strategy:
    from cacp_ray.agent.amc import AMC

    _quieten_ray()
    return AMC(config.paper, mdp, config.rates, config.seed, evaluations)


def _quieten_ray() -> None:
    # After the import, which sets Ray's own levels: it greets every build with migration notices.
    if not logger.isEnabledFor(logging.DEBUG):
        for noisy in ("ray", "ray.rllib"):
            logging.getLogger(noisy).setLevel(logging.ERROR)


def num_searched(config: RunConfig) -> int:
    """Evaluations of the loop: those of the trained policy's own answers are kept for the end."""
    return config.evaluations - (len(config.rates) if config.strategy in CONDITIONAL else 0)
