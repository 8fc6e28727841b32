"""What every agent shares: an RLlib algorithm (new API stack) that is also a search strategy.

Checkpoints, metrics and updates are RLlib's own. Its env runners are not used: episodes are
arithmetic on the cost model and played here, whole and in batches; measuring the candidates is the
search loop's work. `training_step` calls the loop's tick, which submits new work before it tells,
and learns only then: evaluators are busy meanwhile, as each has a second candidate queued.
"""

import contextlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER_GROUP, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModule
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.checkpoints import Checkpointable

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.strategy import Counts, Proposal, Tick

AGENT_STATE = "agent"
SAMPLE_NOISE = 0.05
SAMPLE_NOISE_GROWTH = 1.4  # of every round that finds too few
MAX_SAMPLE_ROUNDS = 20
MAX_UPDATES_A_CALL = 64
MAX_UPDATES_A_STEP = 256  # under a second, which the evaluators' second candidates bridge


class AgentConfig(AlgorithmConfig):
    """RLlib configuration without env runners or learner processes."""

    def __init__(self, algo_class: type[Algorithm]) -> None:
        super().__init__(algo_class=algo_class)
        self.env_runners(num_env_runners=0, create_local_env_runner=False)
        self.learners(num_learners=0)
        # Otherwise the learner checks every gradient, and those of an idle actor are None.
        self.torch_skip_nan_gradients = True

    @property
    def is_online(self) -> bool:
        """False: RLlib samples no environment, so that it makes no env runners."""
        return False


class PruningAgent(Algorithm):
    """An agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name: str
    minibatch_size: int
    updates_per_episode: int
    _mdp: AllocationMDP | None = None
    _tick: Tick | None = None
    _state_to_attach: dict[str, Any] | None = None

    def attach(
        self,
        mdp: AllocationMDP,
        rates: Sequence[float],
        seed: int,
        evaluations: int,
        tick: Tick | None = None,
    ) -> None:
        """Gives the agent its problem, before or after a checkpoint is restored.

        Args:
            mdp: Budget, prior and the arithmetic of an episode.
            rates: Rates to propose for; the policy answers others too.
            seed: Of behaviour and of replay sampling.
            evaluations: Distinct candidates that the search will measure, over all rates.
            tick: What `training_step` calls with this strategy: one turn of the search loop.
        """
        self._mdp = mdp
        self._tick = tick
        self._rng = np.random.default_rng([seed, 2])
        self._told: set[tuple[float, tuple[int, ...]]] = set()
        self.pending_updates = 0
        self._begin(rates, seed, evaluations)
        if self._state_to_attach is not None:
            self._set_agent_state(self._state_to_attach)

    # What an agent adds.

    @abstractmethod
    def _begin(self, rates: Sequence[float], seed: int, evaluations: int) -> None:
        """Fresh memory and behaviour for the attached problem."""

    @abstractmethod
    def _propose(self, count: int) -> list[Proposal]:
        """`count` candidates."""

    @abstractmethod
    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Remembers measurements that were not told before."""

    @abstractmethod
    def _sample(self, num_minibatches: int) -> SampleBatch:
        """Rows for so many minibatches of `minibatch_size`."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """State of memory and behaviour."""

    @abstractmethod
    def _set_memory(self, state: dict[str, Any]) -> None:
        """Takes what `_memory` gave."""

    @property
    @abstractmethod
    def num_episodes(self) -> int:
        """Episodes remembered."""

    @abstractmethod
    def noise(self, rate: float) -> float:
        """Present standard deviation of the action noise at a rate."""

    @abstractmethod
    def _policy(self, rates: ArrayLike) -> Ints:
        """(B, G) greedy keep counts."""

    @abstractmethod
    def _near_policy(
        self, rate: float, noise: float, count: int, rng: np.random.Generator
    ) -> list[Counts]:
        """About `count` candidates of the policy with noise."""

    @abstractmethod
    def _near_beam(
        self,
        rate: float,
        beam: Sequence[Counts],
        noise: float,
        count: int,
        rng: np.random.Generator,
    ) -> list[Counts]:
        """About `count` candidates near those of a beam, which is not empty."""

    # The strategy.

    def ask(self, count: int) -> list[Proposal]:
        """`count` proposals."""
        with _one_thread():
            return self._propose(count)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes, this agent's or others'; learning from them is left to `learn`."""
        fresh: list[tuple[Candidate, Measurement]] = []
        for candidate, measurement in results:
            key = (candidate.rate, candidate.keep_counts)
            if key not in self._told:
                self._told.add(key)
                fresh.append((candidate, measurement))
        if fresh:
            self._store(fresh)
            self.pending_updates += self.updates_per_episode * len(fresh)

    def save(self, folder: str | Path | None = None) -> Any:
        """Writes an RLlib checkpoint: weights, optimizers, replay, clocks, random states."""
        return super().save(None if folder is None else str(Path(folder).absolute()))

    def restore(self, folder: Any) -> None:
        """Restores what `save` wrote; the same calls then give the same answers."""
        super().restore(str(folder.absolute()) if isinstance(folder, Path) else folder)

    # Learning.

    def training_step(self) -> None:
        """One turn of the search loop, then the gradient steps that its results have earned.

        Where many results come at once, learning thins out, so that no evaluator waits for it.
        """
        if self._tick is not None:
            self._tick(self)
        self.pending_updates = min(self.pending_updates, MAX_UPDATES_A_STEP)
        self.learn(self.pending_updates)

    def learn(self, max_updates: int) -> int:
        """Takes up to `max_updates` of the pending gradient steps; returns how many."""
        updates = min(max_updates, self.pending_updates) if self.num_episodes else 0
        for first in range(0, updates, MAX_UPDATES_A_CALL):
            num = min(MAX_UPDATES_A_CALL, updates - first)
            batch = MultiAgentBatch(
                {DEFAULT_MODULE_ID: self._sample(num)}, num * self.minibatch_size
            )
            with _one_thread():
                results = self._learners.update(batch=batch, minibatch_size=self.minibatch_size)
            self.metrics.aggregate(results, key="learners")
        self.pending_updates -= updates
        self.metrics.log_value("episodes", self.num_episodes, window=1)
        self.metrics.log_value("updates", updates, reduce="lifetime_sum")
        return updates

    # The policy.

    @property
    def is_attached(self) -> bool:
        """Whether it has a problem."""
        return self._mdp is not None

    @property
    def mdp(self) -> AllocationMDP:
        """The problem."""
        assert self._mdp is not None, "attach(...) comes first"
        return self._mdp

    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) greedy keep counts, for any reachable rates."""
        with _one_thread():
            return self._policy(rates)

    def policy_samples(
        self,
        rate: float,
        count: int,
        rng: np.random.Generator,
        *,
        beam: Sequence[Counts] = (),
        known: Collection[Counts] = (),
    ) -> list[Counts]:
        """Distinct candidates, at most `count`: the greedy one first, then others around it.

        After the paper's inference: small noise on the policy, and a beam around the best.

        Args:
            rate: Any reachable rate.
            count: Candidates wanted; fewer where no more are found.
            rng: Of the noise.
            beam: The best measured at this rate so far: half of the candidates start from them.
            known: Candidates not to be given again.
        """
        noise = SAMPLE_NOISE
        with _one_thread():
            found = dict.fromkeys(map(tuple, self._policy([rate]).tolist()))  # it keeps the order
            found = {counts: None for counts in found if counts not in known}
            for _ in range(MAX_SAMPLE_ROUNDS):
                missing = count - len(found)
                if missing <= 0:
                    break
                drawn: list[Counts] = []
                if beam:
                    drawn = self._near_beam(rate, beam, noise, (missing + 1) // 2, rng)
                if missing > len(drawn):
                    drawn += self._near_policy(rate, noise, missing - len(drawn), rng)
                found |= {counts: None for counts in drawn if counts not in known}
                noise *= SAMPLE_NOISE_GROWTH
        return list(found)[:count]

    def get_module(self, module_id: str = DEFAULT_MODULE_ID) -> RLModule | None:
        """The learner's own networks: there are no copies in env runners."""
        learner = self._learners._learner
        return None if learner is None else learner.module[module_id]

    @property
    def _learners(self) -> LearnerGroup:
        assert self.learner_group is not None
        return self.learner_group

    # Checkpoints.

    def get_state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """RLlib's state, and that of the search."""
        state = super().get_state(*args, **kwargs)
        if self._mdp is not None:
            state[AGENT_STATE] = {
                "memory": self._memory(),
                "random": self._rng.bit_generator.state,
                "told": set(self._told),
                "pending_updates": self.pending_updates,
            }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        state = dict(state)
        agent_state = state.pop(AGENT_STATE, None)
        # RLlib's own would hand the weights on to env runners, which we do not have.
        learner_state = state.pop(COMPONENT_LEARNER_GROUP, None)
        super().set_state(state)
        if learner_state is not None:
            self._learners.set_state(learner_state)
        if agent_state is not None:
            self._state_to_attach = agent_state
            if self._mdp is not None:
                self._set_agent_state(agent_state)

    def restore_from_path(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in RLlib, less the env runners."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

    def _set_agent_state(self, state: dict[str, Any]) -> None:
        self._set_memory(state["memory"])
        self._rng.bit_generator.state = state["random"]
        self._told = set(state["told"])
        self.pending_updates = state["pending_updates"]
        self._state_to_attach = None

    def cleanup(self) -> None:
        """Also removes the empty folder that Tune makes for an algorithm it does not run."""
        super().cleanup()
        with contextlib.suppress(OSError):
            Path(str(self.logdir)).rmdir()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Small matrices are fastest on one thread, and the other cores belong to the evaluators."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
