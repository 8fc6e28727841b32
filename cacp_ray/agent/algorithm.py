"""The conditional agent as an RLlib algorithm (new API stack) that is also a search strategy.

Checkpoints, metrics and updates are RLlib's own. Its env runners are not used: episodes are
arithmetic on the cost model and played here, whole and in batches; measuring the candidates is the
search loop's work. `training_step` calls the loop's tick, which submits new work before it tells,
and learns only then: evaluators are busy meanwhile, as each has a second candidate queued.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.algorithms.algorithm_config import AlgorithmConfig
from ray.rllib.core import COMPONENT_LEARNER_GROUP, DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.learner_group import LearnerGroup
from ray.rllib.core.rl_module.rl_module import RLModule, RLModuleSpec
from ray.rllib.policy.sample_batch import MultiAgentBatch, SampleBatch
from ray.rllib.utils.checkpoints import Checkpointable

from cacp_ray.agent.behaviour import Behaviour
from cacp_ray.agent.learner import RETURNS, WEIGHTS, CACPLearner
from cacp_ray.agent.module import ActorCritic
from cacp_ray.agent.replay import Replay
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.mdp import NUM_FEATURES, AllocationMDP, Float32s, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Proposal, Strategy

AGENT_STATE = "agent"
MAX_UPDATES_A_CALL = 64
MAX_SAMPLE_ROUNDS = 20

Tick = Callable[[Strategy], object]


class CACPConfig(AlgorithmConfig):
    """RLlib configuration of the agent: `CACPConfig().agent(settings, seed=0).build_algo()`."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class=algo_class or CACP)
        self.settings = AgentSettings()
        self.environment(
            observation_space=gym.spaces.Box(0.0, 1.0, (NUM_FEATURES,), np.float32),
            action_space=gym.spaces.Box(-1.0, 1.0, (1,), np.float32),
        )
        self.env_runners(num_env_runners=0, create_local_env_runner=False)
        self.learners(num_learners=0)
        # Otherwise the learner checks every gradient, and those of an idle actor are None.
        self.torch_skip_nan_gradients = True

    def agent(self, settings: AgentSettings, *, seed: int = 0) -> "CACPConfig":
        """Sets what is particular to this agent.

        Args:
            settings: Of networks, learning and behaviour.
            seed: Of the initial weights.
        """
        self.settings = settings
        return self.rl_module(model_config={"hidden": settings.hidden, "seed": seed})

    @property
    def is_online(self) -> bool:
        """False: RLlib samples no environment, so that it makes no env runners."""
        return False

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The actor and the critic."""
        return RLModuleSpec(module_class=ActorCritic)

    def get_default_learner_class(self) -> type[CACPLearner]:
        """The update rule."""
        return CACPLearner


class CACP(Algorithm):
    """The agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name = "cacp"
    config: CACPConfig
    _mdp: AllocationMDP | None = None
    _state_to_attach: dict[str, Any] | None = None

    @classmethod
    def get_default_config(cls) -> CACPConfig:
        """Our defaults."""
        return CACPConfig()

    def attach(
        self, mdp: AllocationMDP, rates: Sequence[float], seed: int, tick: Tick | None = None
    ) -> None:
        """Gives the agent its problem, before or after a checkpoint is restored.

        Args:
            mdp: The arithmetic of an episode.
            rates: Rates to propose for; the policy answers others too.
            seed: Of behaviour and of replay sampling.
            tick: What `training_step` calls with this strategy: one turn of the search loop.
        """
        self._mdp = mdp
        self._tick = tick
        self._replay = Replay(mdp.num_steps, mdp.state_size)
        self._behaviour = Behaviour(self.config.settings, rates, mdp.num_steps, seed)
        self._rng = np.random.default_rng([seed, 2])
        self._told: set[tuple[float, tuple[int, ...]]] = set()
        self.pending_updates = 0
        if self._state_to_attach is not None:
            self._set_agent_state(self._state_to_attach)

    # The strategy.

    def ask(self, count: int) -> list[Proposal]:
        """`count` proposals, spread evenly over the rates."""
        with _one_thread():
            return self._behaviour.propose(self.mdp, self._act, count)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes, this agent's or others'; learning from them is left to `learn`."""
        fresh: list[tuple[Candidate, Measurement]] = []
        for candidate, measurement in results:
            key = (candidate.rate, candidate.keep_counts)
            if key not in self._told:
                self._told.add(key)
                fresh.append((candidate, measurement))
        if not fresh:
            return
        rates = [candidate.rate for candidate, _ in fresh]
        counts = np.array([candidate.keep_counts for candidate, _ in fresh])
        states, actions = self.mdp.replay(rates, counts)
        is_ok = np.array([found.status == "ok" for _, found in fresh])
        rewards = np.where(is_ok, [found.top1 for _, found in fresh], 0)
        images = np.where(is_ok, [found.images for _, found in fresh], 0)
        self._replay.add(states, actions, rates, rewards, images)
        for i, (candidate, found) in enumerate(fresh):
            if is_ok[i] and candidate.images is None:
                self._behaviour.adopt(candidate.rate, candidate.keep_counts, found.top1, actions[i])
        self.pending_updates += self.config.settings.updates_per_episode * len(fresh)

    def save(self, folder: str | Path | None = None) -> Any:
        """Writes an RLlib checkpoint: weights, optimizers, replay, clocks, random states."""
        return super().save(None if folder is None else str(Path(folder).absolute()))

    def restore(self, folder: Any) -> None:
        """Restores what `save` wrote; the same calls then give the same answers."""
        super().restore(str(folder.absolute()) if isinstance(folder, Path) else folder)

    # Learning.

    def training_step(self) -> None:
        """One turn of the search loop, then the gradient steps that its results have earned."""
        if self._tick is not None:
            self._tick(self)
        self.learn(self.pending_updates)

    def learn(self, max_updates: int) -> int:
        """Takes up to `max_updates` of the pending gradient steps; returns how many."""
        updates = min(max_updates, self.pending_updates) if len(self._replay) else 0
        batch_size = self.config.settings.batch_size
        for first in range(0, updates, MAX_UPDATES_A_CALL):
            num = min(MAX_UPDATES_A_CALL, updates - first)
            sample = self._replay.sample(num * batch_size, self._rng)
            batch = SampleBatch(
                {
                    Columns.OBS: sample["states"],
                    Columns.ACTIONS: sample["actions"],
                    RETURNS: sample["returns"],
                    WEIGHTS: sample["weights"],
                }
            )
            with _one_thread():
                results = self._learners.update(
                    batch=MultiAgentBatch({DEFAULT_MODULE_ID: batch}, num * batch_size),
                    minibatch_size=batch_size,
                )
            self.metrics.aggregate(results, key="learners")
        self.pending_updates -= updates
        self.metrics.log_value("episodes", len(self._replay), window=1)
        self.metrics.log_value("updates", updates, reduce="lifetime_sum")
        return updates

    # The policy.

    @property
    def mdp(self) -> AllocationMDP:
        """The problem."""
        assert self._mdp is not None, "attach(...) comes first"
        return self._mdp

    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) greedy keep counts, for any reachable rates."""
        with _one_thread():
            return self.mdp.play(rates, self._act)

    def policy_samples(
        self, rate: float, count: int, noise: float, rng: np.random.Generator
    ) -> Ints:
        """(N, G) distinct candidates, N <= `count`: the greedy one first, then noisy rollouts.

        Args:
            rate: Any reachable rate.
            count: Candidates wanted; fewer where the noise finds no more.
            noise: Standard deviation on the actions.
            rng: Of the noise.
        """

        def act(states: Float32s, step: int) -> NDArray[np.floating]:
            drawn = noise * rng.standard_normal(len(states))
            return np.clip(self._act(states, step) + drawn, -1, 1)

        # A dict keeps the order found.
        found = {tuple(self.policy([rate])[0].tolist()): None}
        with _one_thread():
            for _ in range(MAX_SAMPLE_ROUNDS):
                if len(found) >= count:
                    break
                played = self.mdp.play(np.full(count, rate), act)
                found |= {tuple(row): None for row in played.tolist()}
        return np.array(list(found)[:count], dtype=np.int64)

    def _act(self, states: Float32s, step: int) -> NDArray[np.floating]:
        module = cast(ActorCritic, self.get_module())
        with torch.inference_mode():
            return module.actor(torch.from_numpy(states)).squeeze(1).numpy()

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
                "replay": self._replay.get_state(),
                "behaviour": self._behaviour.get_state(),
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
        self._replay.set_state(state["replay"])
        self._behaviour.set_state(state["behaviour"])
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
