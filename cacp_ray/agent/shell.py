"""The shell of the paper's agent: an algorithm of RLlib (new API stack), and a search strategy.

Checkpoints, metrics and updates are RLlib's own. Its env runners are not used: episodes are
arithmetic on the cost model, played here whole and in batches. The search loop has the candidates
measured. It calls `learn` after it has submitted new work and told the results, so the evaluators
stay busy while the agent learns: each has a second candidate queued.
"""

import contextlib
import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast

import gymnasium as gym
import numpy as np
from numpy.typing import ArrayLike
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER_GROUP, DEFAULT_MODULE_ID
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.learner.torch.torch_learner import TorchLearner
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.checkpoints import Checkpointable
from torch import nn

from cacp_ray.agent.parts import (
    POLICY_FILE,
    EpisodeArrays,
    load_networks,
    one_thread,
    sample_around,
)
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.io.files import write_tensors
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.strategy import Counts

Settings = TypeVar("Settings")

AGENT_STATE = "agent"
MAX_UPDATES_A_CALL = 64
FIGURES = ("critic_loss", "policy_value")  # a learner's metrics that learning logs show
MAX_UPDATES_A_STEP = 256  # under a second; the evaluators work on their second candidates


class AgentConfig(AlgorithmConfig, Generic[Settings]):
    """RLlib configuration without env runners or learner processes.

    Attributes:
        settings: Networks, learning and behaviour of the agent.
        networks: Actor and critics.
        update_rule: Class of the learner.
    """

    settings: Settings
    networks: type[RLModule]
    update_rule: type[TorchLearner]

    def __init__(self, algo_class: type[Algorithm]) -> None:
        super().__init__(algo_class=algo_class)
        self.env_runners(num_env_runners=0, create_local_env_runner=False)
        self.learners(num_learners=0)
        # Otherwise the learner checks every gradient, and an idle actor's gradients are None.
        self.torch_skip_nan_gradients = True

    def shape(
        self, settings: Settings, num_features: int, num_actions: int, low: float, **model: Any
    ) -> Self:
        """Sets the settings and what the networks are made for: actions from `low` to 1."""
        self.settings = settings
        self.environment(
            observation_space=gym.spaces.Box(0.0, 1.0, (num_features,), np.float32),
            action_space=gym.spaces.Box(low, 1.0, (num_actions,), np.float32),
        )
        return self.rl_module(model_config=model)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The networks."""
        return RLModuleSpec(module_class=self.networks)

    def get_default_learner_class(self) -> type[TorchLearner]:
        """The update rule."""
        return self.update_rule

    @property
    def is_online(self) -> bool:
        """False: RLlib samples no environment, so it makes no env runners."""
        return False


class PruningAgent(Algorithm):
    """An agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name: str
    minibatch_size: int
    updates_per_episode: int
    _replay: EpisodeArrays
    _mdp: AllocationMDP | None = None
    _state_to_attach: dict[str, Any] | None = None

    def attach(
        self, mdp: AllocationMDP, rates: Sequence[float], seed: int, evaluations: int
    ) -> None:
        """Gives the agent its problem, before or after a checkpoint is restored.

        It proposes for `rates`; the policy answers others too. `evaluations` are the distinct
        candidates that the search will measure, over all rates.
        """
        self._mdp = mdp
        self._rng = np.random.default_rng([seed, 2])
        self._told: set[tuple[float, Counts]] = set()
        self.pending_updates = 0
        self.num_updates = 0
        self._begin(rates, seed, evaluations)
        if self._state_to_attach is not None:
            self._set_agent_state(self._state_to_attach)

    # What an agent adds.

    @abstractmethod
    def _begin(self, rates: Sequence[float], seed: int, evaluations: int) -> None:
        """Makes fresh memory and behaviour for the attached problem."""

    @abstractmethod
    def ask(self, count: int) -> list[Candidate]:
        """Returns `count` candidates."""

    @abstractmethod
    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Remembers measurements, each told for the first time."""

    @abstractmethod
    def _sample(self, num_minibatches: int) -> SampleBatch:
        """Rows for `num_minibatches` of `minibatch_size` each."""

    @abstractmethod
    def _memory(self) -> dict[str, Any]:
        """State of the behaviour."""

    @abstractmethod
    def _set_memory(self, state: dict[str, Any]) -> None:
        """Takes what `_memory` gave."""

    @abstractmethod
    def noise(self, rate: float) -> float:
        """Present standard deviation of the action noise at a rate."""

    @abstractmethod
    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) greedy keep counts, for any reachable rates."""

    @abstractmethod
    def _near(
        self,
        rate: float,
        noise: float,
        count: int,
        rng: np.random.Generator,
        beam: Sequence[Counts] = (),
    ) -> list[Counts]:
        """About `count` candidates near those of a beam, or without one near the policy."""

    # The strategy.

    @property
    def num_episodes(self) -> int:
        """Episodes remembered."""
        return len(self._replay)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes, this agent's or others'; `learn` uses them."""
        fresh: list[tuple[Candidate, Measurement]] = []
        for candidate, measurement in results:
            key = (candidate.rate, candidate.keep_counts)
            if key not in self._told:
                self._told.add(key)
                fresh.append((candidate, measurement))
        if fresh:
            self._store(fresh)
            self.pending_updates += self.updates_per_episode * len(fresh)

    def save(self, folder: str | Path | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Writes an RLlib checkpoint: weights, optimizers, replay, clocks, random states.

        `POLICY_FILE` beside it holds the networks alone, for readers that open no pickle.
        """
        if folder is None:
            return super().save(None)
        saved = super().save(str(Path(folder).absolute()))
        write_tensors(Path(folder) / POLICY_FILE, self._networks.state_dict())
        return saved

    def restore(self, folder: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Restores what `save` wrote; the same calls then give the same answers."""
        super().restore(str(folder.absolute()) if isinstance(folder, Path) else folder)

    def load_policy(self, file: Path) -> None:
        """Takes the networks of a `POLICY_FILE`; told what was measured, it then answers any rate.

        Raises:
            ArtifactError: The file cannot be read, or its networks have other sizes.
        """
        load_networks(self._networks, file)

    # Learning.

    def learn(self, most: int = MAX_UPDATES_A_STEP) -> dict[str, float]:
        """Takes the gradient steps that new episodes have earned; those above `most` are dropped.

        Where many episodes come at once, learning thins out, so that no evaluator waits for it. The
        result has `updates`, the gradient steps so far, and those of the learner's FIGURES that the
        steps of this call have.
        """
        self.pending_updates = min(self.pending_updates, most)
        figures = {"updates": float(self.num_updates + self.update(self.pending_updates))}
        learned = self.metrics.compile().get("learners", {}).get(DEFAULT_MODULE_ID, {})
        for name in FIGURES:
            value = float(learned.get(name, math.nan))
            if math.isfinite(value):
                figures[name] = value
        return figures

    def update(self, max_updates: int) -> int:
        """Takes up to `max_updates` of the pending gradient steps; returns how many."""
        updates = min(max_updates, self.pending_updates) if self.num_episodes else 0
        for first in range(0, updates, MAX_UPDATES_A_CALL):
            num = min(MAX_UPDATES_A_CALL, updates - first)
            rows = {DEFAULT_MODULE_ID: self._sample(num)}
            batch = MultiAgentBatch(rows, num * self.minibatch_size)
            with one_thread():
                results = self._learners.update(batch=batch, minibatch_size=self.minibatch_size)
            self.metrics.aggregate(results, key="learners")
        self.pending_updates -= updates
        self.num_updates += updates
        return updates

    @property
    def mdp(self) -> AllocationMDP:
        """The problem."""
        assert self._mdp is not None, "attach(...) comes first"
        return self._mdp

    @one_thread()
    def policy_samples(
        self,
        rate: float,
        count: int,
        rng: np.random.Generator,
        *,
        beam: Sequence[Counts] = (),
        known: Collection[Counts] = (),
    ) -> list[Counts]:
        """Distinct candidates, at most `count`, around the policy and a beam: `sample_around`."""
        (greedy,) = map(tuple, self.policy([rate]).tolist())

        def near(noise: float, number: int, beam: Sequence[Counts]) -> list[Counts]:
            return self._near(rate, noise, number, rng, beam)

        return sample_around(greedy, count, near, beam, known)

    @property
    def _networks(self) -> nn.Module:
        return cast(nn.Module, self.get_module())

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
        """RLlib's state and the state of the search."""
        state = super().get_state(*args, **kwargs)
        if self._mdp is not None:
            state[AGENT_STATE] = {
                "replay": self._replay.get_state(),
                "memory": self._memory(),
                "random": self._rng.bit_generator.state,
                "told": set(self._told),
                "pending_updates": self.pending_updates,
                "num_updates": self.num_updates,
            }
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        state = dict(state)
        agent_state = state.pop(AGENT_STATE, None)
        # RLlib's own `set_state` would hand the weights to env runners, which do not exist.
        learner_state = state.pop(COMPONENT_LEARNER_GROUP, None)
        super().set_state(state)
        if learner_state is not None:
            self._learners.set_state(learner_state)
        if agent_state is not None:
            self._state_to_attach = agent_state
            if self._mdp is not None:
                self._set_agent_state(agent_state)

    def restore_from_path(self, path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Restores like RLlib, without env runners."""
        Checkpointable.restore_from_path(self, path, *args, **kwargs)

    def _set_agent_state(self, state: dict[str, Any]) -> None:
        self._replay.set_state(state["replay"])
        self._set_memory(state["memory"])
        self._rng.bit_generator.state = state["random"]
        self._told = set(state["told"])
        self.pending_updates = state["pending_updates"]
        self.num_updates = state["num_updates"]
        self._state_to_attach = None

    def cleanup(self) -> None:
        """Also removes the empty folder that RLlib makes for Tune."""
        super().cleanup()
        with contextlib.suppress(OSError):
            Path(str(self.logdir)).rmdir()
