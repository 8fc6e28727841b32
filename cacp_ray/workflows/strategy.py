"""The strategy of a run, from its configuration."""

import logging
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.agent.cacp.agent import CACP
from cacp_ray.agent.parts import POLICY_FILE
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.pruning.criteria import needs, score_channels
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.allocation import AllocationSpace, Prior, uniform_prior
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.strategies import AGENTS, FROM_A_PRIOR, WIDTH_STRATEGIES
from cacp_ray.searching.strategies.prior import PriorFirst
from cacp_ray.searching.strategies.problem import Problem, Scores
from cacp_ray.searching.strategies.table import make_strategy
from cacp_ray.searching.strategy import Counts, Strategy
from cacp_ray.workflows.setup import Setup

logger = logging.getLogger(__name__)

CONDITIONAL = ("cacp", "cacp-paper")  # one policy for every rate


@runtime_checkable
class Policy(Protocol):
    """A strategy that answers any rate, asked for or not."""

    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) greedy keep counts."""
        ...

    def policy_samples(
        self,
        rate: float,
        count: int,
        rng: np.random.Generator,
        *,
        beam: Sequence[Counts] = (),
        known: Collection[Counts] = (),
    ) -> list[Counts]:
        """At most `count` distinct keep counts around the greedy ones and around a beam."""
        ...

    def noise(self, rate: float) -> float:
        """Standard deviation of the action noise at a rate."""
        ...

    def stop(self) -> None:
        """Frees what the agent holds."""
        ...


def make_run_strategy(setup: Setup) -> Strategy:
    """What proposes candidates in a run.

    Raises:
        ConfigError: The strategy needs more evaluations.
    """
    config, name = setup.config, setup.config.strategy
    agent = _build_paper_agent(config) if name == "cacp-paper" else None  # early: it takes seconds

    def make(prior: Prior) -> Any:
        if name not in AGENTS:
            return make_strategy(name, _make_problem(setup, prior))
        if name == "cacp":
            space = AllocationSpace(setup.budget, prior, config.agent.action_scale)
            return CACP(config.agent, space, config.rates, config.seed)
        mdp = AllocationMDP(setup.plan.cost_model, setup.budget, prior, config.agent.action_scale)
        if agent is None:
            return _build_amc(config, mdp)
        agent.attach(mdp, config.rates, config.seed, config.evaluations)
        return agent

    uniform = uniform_prior(len(setup.budget.num_channels))
    is_paper = name in ("cacp-paper", "amc")
    if name == "cacp" or name in FROM_A_PRIOR or (is_paper and config.paper.prior):
        return PriorFirst(_make_problem(setup, uniform), make, name=name)
    return make(uniform)


def find_policy(strategy: Strategy) -> Policy | None:
    """The policy of a strategy; None until its prior is chosen, or where it has no policy."""
    inner = strategy.strategy if isinstance(strategy, PriorFirst) else strategy
    return inner if isinstance(inner, Policy) else None


def read_policy(setup: Setup, checkpoint: Path, told: Sequence[EpisodeRecord]) -> Policy | None:
    """The policy of a checkpoint; None until its prior is chosen.

    No pickle is read: the strategy is told again what was measured, and takes the networks.

    Raises:
        ArtifactError: The checkpoint has no such networks.
    """
    if setup.config.mode == "rounds":
        told = sorted(told, key=lambda row: row.index)  # the order of telling
    strategy = make_run_strategy(setup)
    rows = iter([(row.candidate, row) for row in told])
    while find_policy(strategy) is None and (row := next(rows, None)) is not None:
        strategy.tell([row])  # one by one, until the prior is chosen
    strategy.tell([*rows])
    policy = find_policy(strategy)
    if policy is not None:
        file = next(checkpoint.rglob(POLICY_FILE), None)
        if file is None:
            raise ArtifactError(
                f"{checkpoint} has no {POLICY_FILE}, as an earlier cacp_ray wrote it: run the "
                "search again with --resume, which measures nothing anew"
            )
        cast(Any, policy).load_policy(file)
    return policy


def num_reserved(config: RunConfig) -> int:
    """Evaluations that a search leaves to its policy's own answers, one a rate."""
    return len(config.rates) if config.strategy in CONDITIONAL else 0


def check_strategy(setup: Setup) -> None:
    """Refuses a strategy that cannot be made, before anything is written.

    Raises:
        ConfigError: It needs more evaluations, or something that is not installed.
    """
    if setup.config.strategy == "cap" and not setup.task.metric.is_share:
        raise ConfigError(
            "strategy cap goes from the whole network's accuracy down to 0, and needs a score that "
            "is a share: choose another for a task of your own"
        )
    if setup.config.strategy not in (*AGENTS, *WIDTH_STRATEGIES):
        prior = uniform_prior(len(setup.budget.num_channels))
        make_strategy(setup.config.strategy, _make_problem(setup, prior))


def _make_problem(setup: Setup, prior: Prior) -> Problem:
    def scores(criterion: str) -> Scores:
        chosen = criterion or setup.config.pruning.criterion
        statistics = setup.find_statistics() if needs(chosen) else Statistics()
        tensors = setup.model.state_dict()
        return score_channels(chosen, setup.plan, tensors, statistics, setup.config.seed)

    return Problem(
        cost_model=setup.plan.cost_model,
        budget=setup.budget,
        rates=setup.config.rates,
        seed=setup.config.seed,
        evaluations=setup.config.evaluations,
        prior=prior,
        scores=scores,
    )


def _build_paper_agent(config: RunConfig) -> Any:
    from cacp_ray.agent.ddpg.algorithm import DDPGConfig

    _quieten_ray()
    return DDPGConfig().agent(config.paper, seed=config.seed).build_algo()


def _build_amc(config: RunConfig, mdp: AllocationMDP) -> Strategy:
    from cacp_ray.agent.amc import AMC

    _quieten_ray()
    return AMC(config.paper, mdp, config.rates, config.seed, config.evaluations)


def _quieten_ray() -> None:
    # After the import, which sets Ray's own levels: it greets every build with migration notices.
    if not logger.isEnabledFor(logging.DEBUG):
        for noisy in ("ray", "ray.rllib"):
            logging.getLogger(noisy).setLevel(logging.ERROR)
