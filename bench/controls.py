"""Controls of the agent for bench/agents.py, which are no strategies of the package.

They answer what the agent's parts are worth: another surrogate in the critics' place and no actor,
or rivals that see the loss as the critics do. `bench/agents.py` names them as `controls:make_...`.
"""

import warnings
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.agent.cacp.behaviour import Behaviour
from cacp_ray.agent.cacp.replay import Replay
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.allocation import AllocationSpace, Float32s, Prior
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategies.cem import CEM
from cacp_ray.searching.strategies.hill_climb import HillClimb
from cacp_ray.searching.strategies.prior import PriorFirst
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts, Strategy

LOSS_WEIGHT = 1 / 3  # brings the spread of losses near that of accuracies on CIFAR-10
FIRST = 10  # measurements a rate before the process is asked, as before the critics learn
REFIT_EVERY = 30  # measurements; in between, lengths and noise stay and the data grow


class ProcessSearch:
    """The agent with a Gaussian process in its critics' place.

    The process maps log keep ratios to the agent's own values (cacp_ray/agent/cacp/replay.py).
    """

    name = "process"

    def __init__(self, problem: Problem) -> None:
        settings = AgentSettings()
        self._space = AllocationSpace(problem.budget, problem.prior, settings.action_scale)
        self._replay = Replay(self._space.num_offsets)
        self._behaviour = Behaviour(settings, self._space, problem.rates, self._value, problem.seed)
        self._process: Any = None
        self._num_rates, self._fitted, self._told = len(problem.rates), 0, set[Any]()

    def _value(self, counts: Ints | Floats) -> Float32s:
        if self._process is None:  # no draft is better than another, so the first is taken
            return np.zeros(len(counts), np.float32)
        return self._process.predict(self._space.log_ratios(counts)).astype(np.float32)

    def ask(self, count: int) -> list[Candidate]:
        """As the agent."""
        return self._behaviour.propose(count)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Remembers measurements, and fits the process."""
        for candidate, measurement in results:
            key = (candidate.rate, candidate.keep_counts)
            if key in self._told or measurement.status != "ok":
                continue
            self._told.add(key)
            counts = np.array([candidate.keep_counts])
            offsets = self._space.encode([candidate.rate], counts)
            self._replay.add(
                log_ratios=self._space.log_ratios(counts),
                score=[measurement.score],
                loss=[measurement.loss],
                images=[measurement.images],
            )
            self._behaviour.adopt(candidate, measurement.score, offsets[0])
        if len(self._replay) >= FIRST * self._num_rates:
            self._fit()

    def _fit(self) -> None:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.gaussian_process import GaussianProcessRegressor
        from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

        # A length at its bound says that a group matters little.
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        x, y = self._replay.log_ratios.astype(float), self._replay.values()
        if self._process is None or len(self._replay) >= self._fitted + REFIT_EVERY:
            lengths = Matern(np.full(x.shape[1], 1.0), (0.03, 30.0), nu=2.5)
            kernel = ConstantKernel(1.0, (0.01, 1000.0)) * lengths + WhiteKernel(0.01, (1e-4, 1.0))
            process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
            self._fitted = len(self._replay)
        else:
            kernel = self._process.kernel_
            process = GaussianProcessRegressor(kernel, normalize_y=True, optimizer=None)
        self._process = process.fit(x, y)

    def noise(self, rate: float) -> float:
        """As the agent."""
        return self._behaviour.noise(rate)

    def policy(self, rates: ArrayLike) -> Ints:
        """As the agent's: the mean of the drafts that the process favours."""
        rates = np.asarray(rates, dtype=np.float64)
        offsets = np.stack([self._behaviour.favoured(rate) for rate in rates.tolist()])
        return self._space.decode(rates, offsets)

    def policy_samples(
        self,
        rate: float,
        count: int,
        rng: np.random.Generator,
        *,
        beam: Sequence[Counts] = (),
        known: Collection[Counts] = (),
    ) -> list[Counts]:
        """Not used in the benchmark."""
        raise NotImplementedError

    def stop(self) -> None:
        """Holds nothing."""

    def save(self, folder: Path) -> None:
        """A search of the benchmark is told again what was measured; see `restore`."""

    def restore(self, folder: Path) -> None:
        """Begins anew."""


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
