"""Controls of the agent for bench/agents.py, which are no strategies of the package.

They answer what the agent's parts are worth: another surrogate in the critics' place and no actor,
or rivals that see the loss as the critics do. `bench/agents.py` names them as `controls:make_...`.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.agent.cacp.agent import CACP
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.allocation import AllocationSpace, Float32s, Prior
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategies.cem import CEM
from cacp_ray.searching.strategies.hill_climb import HillClimb
from cacp_ray.searching.strategies.prior import PriorFirst
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Strategy

LOSS_WEIGHT = 1 / 3  # brings the spread of losses near that of accuracies on CIFAR-10
REFIT_EVERY = 30  # measurements; in between, lengths and noise stay and the data grow


class ProcessSearch(CACP):
    """The agent with a Gaussian process in its critics' place.

    The process maps log keep ratios to the agent's own values (cacp_ray/agent/cacp/replay.py).
    """

    name = "process"

    def __init__(self, problem: Problem) -> None:
        settings = AgentSettings()
        space = AllocationSpace(problem.budget, problem.prior, settings.action_scale)
        self._process: Any = None
        self._fitted = 0
        super().__init__(settings, space, problem.rates, problem.seed)

    def _value(self, counts: Ints | Floats) -> Float32s:
        if self._process is None:  # no draft is better than another, so the first is taken
            return np.zeros(len(counts), np.float32)
        return self._process.predict(self.space.log_ratios(counts)).astype(np.float32)

    def learn(self, most: int = 0) -> dict[str, float]:
        """Fits the process to all that was told, once there is enough."""
        if self.pending_updates and not self._is_early:
            self._fit()
            self.pending_updates = 0
        return {}

    def _fit(self) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        # A length at its bound says that a group matters little.
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        x, y = self._replay.log_ratios.astype(float), self._replay.values()
        if self._process is None or len(x) >= self._fitted + REFIT_EVERY:
            lengths = Matern(np.full(x.shape[1], 1.0), (0.03, 30.0), nu=2.5)
            kernel = ConstantKernel(1.0, (0.01, 1000.0)) * lengths + WhiteKernel(0.01, (1e-4, 1.0))
            process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
            self._fitted = len(x)
        else:
            kernel = self._process.kernel_
            process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=None)
        self._process = process.fit(x, y)


class BySum:
    """A strategy that is told accuracy less a share of the loss in place of the accuracy."""

    def __init__(self, strategy: Any) -> None:
        self._strategy, self.name = strategy, f"{strategy.name}, sees the loss"

    def ask(self, count: int) -> list[Candidate]:
        """As the strategy."""
        return self._strategy.ask(count)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Tells the strategy other scores; winners are still those of the accuracy."""
        self._strategy.tell(
            [(c, replace(m, score=m.score - LOSS_WEIGHT * m.loss)) for c, m in results]
        )

    def save(self, folder: Path) -> None:
        """As the strategy."""
        self._strategy.save(folder)

    def restore(self, folder: Path) -> None:
        """As the strategy."""
        self._strategy.restore(folder)


def make_process(problem: Problem) -> Strategy:
    """`ProcessSearch` from a measured prior."""
    return _from_prior(problem, ProcessSearch)


def make_hill_climb(problem: Problem) -> Strategy:
    """`hill_climb` that sees the loss."""
    return _from_prior(problem, lambda p: BySum(HillClimb(p)))


def make_cem(problem: Problem) -> Strategy:
    """`cem` that sees the loss."""
    return _from_prior(problem, lambda p: BySum(CEM(p)))


def _from_prior(problem: Problem, make: Callable[[Problem], Any]) -> Strategy:
    def begin(prior: Prior) -> Any:
        return make(replace(problem, prior=prior))

    return PriorFirst(problem, begin, name="control")
