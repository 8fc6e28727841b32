"""The conditional agent: one actor and a few critics lead the search at every rate.

A proposal: drafts around the policy and around good allocations, screened by the critics
(behaviour.py). Learning: what was measured, on one scale for all rates (replay.py, learner.py).
Offsets from a prior make the first candidates sound and carry over between rates
(searching/allocation.py).
"""

from collections.abc import Sequence
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.policy.sample_batch import SampleBatch

from cacp_ray.agent.cacp.behaviour import Behaviour
from cacp_ray.agent.cacp.learner import REPLACED, CACPLearner
from cacp_ray.agent.cacp.module import ActorCritic
from cacp_ray.agent.cacp.replay import Replay
from cacp_ray.agent.shell import AgentConfig, PruningAgent
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.allocation import Float32s
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Counts, Proposal

NUM_CRITICS = 3
LEARNED_FROM = 10  # episodes a rate


class CACPConfig(AgentConfig):
    """RLlib configuration: `CACPConfig().agent(settings, seed=0, num_actions=P).build_algo()`."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class or CACP)
        self.settings = AgentSettings()

    def agent(self, settings: AgentSettings, *, seed: int = 0, num_actions: int) -> "CACPConfig":
        """Sets what is particular to this agent.

        Args:
            settings: Of networks, learning and behaviour.
            seed: Of the initial weights.
            num_actions: Groups that may be cut.
        """
        self.settings = settings
        self.environment(
            observation_space=gym.spaces.Box(0.0, 1.0, (1,), np.float32),
            action_space=gym.spaces.Box(-1.0, 1.0, (num_actions,), np.float32),
        )
        model = {"hidden": settings.hidden, "seed": seed, "num_critics": NUM_CRITICS}
        return self.rl_module(model_config=model)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """The actor and the critics."""
        return RLModuleSpec(module_class=ActorCritic)

    def get_default_learner_class(self) -> type[CACPLearner]:
        """The update rule."""
        return CACPLearner


class CACP(PruningAgent):
    """The agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name = "cacp"
    config: CACPConfig

    @classmethod
    def get_default_config(cls) -> CACPConfig:
        """Our defaults."""
        return CACPConfig()

    def _begin(self, rates: Sequence[float], seed: int, evaluations: int) -> None:
        settings, space = self.config.settings, self.mdp.space
        self.minibatch_size = NUM_CRITICS * settings.batch_size
        self.updates_per_episode = settings.updates_per_episode
        self._replay = Replay(space.num_offsets)
        self._behaviour = Behaviour(settings, space, rates, self._act, self._value, seed)

    def _propose(self, count: int) -> list[Proposal]:
        return self._behaviour.propose(count)

    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        rates = [candidate.rate for candidate, _ in results]
        space = self.mdp.space
        counts = np.array([candidate.keep_counts for candidate, _ in results])
        offsets = space.encode(rates, counts)
        status = np.array([found.status for _, found in results])
        self._replay.add(
            rates=rates,
            offsets=offsets,
            log_ratios=space.log_ratios(counts),
            shares=space.cost_shares(counts),
            top1=[found.top1 for _, found in results],
            # Of images that others were not scored on, it would say more about the images.
            loss=np.where(status == "ok", [found.loss for _, found in results], 0),
            images=np.where(status != "failed", [found.images for _, found in results], 0),
        )
        for i, (candidate, found) in enumerate(results):
            if status[i] == "ok" and candidate.images is None:
                self._behaviour.adopt(candidate.rate, candidate.keep_counts, found.top1, offsets[i])

    def learn(self, max_updates: int) -> int:
        """As every agent, but not from the first few episodes: they lead below the prior."""
        return 0 if self._is_early else super().learn(max_updates)

    @property
    def _is_early(self) -> bool:
        return self.num_episodes < LEARNED_FROM * len(self._behaviour.num_asked)

    def _sample(self, num_minibatches: int) -> SampleBatch:
        count = num_minibatches * self.minibatch_size
        rows = self._replay.sample(count, self._rng)
        replaced = self._rng.integers(self.mdp.space.num_offsets, size=count)
        return SampleBatch({**rows, REPLACED: replaced})

    @property
    def num_episodes(self) -> int:
        """Episodes in the replay."""
        return len(self._replay)

    def noise(self, rate: float) -> float:
        """Present standard deviation of the action noise at a rate."""
        return self._behaviour.noise(rate)

    def _policy(self, rates: ArrayLike) -> Ints:
        """The mean of those drafts around the actor and good allocations that the critics favour.

        Before anything was learned the actor's answers, which are the prior's; without learning the
        mean of good allocations, interpolated between rates.
        """
        rates = np.asarray(rates, dtype=np.float64)
        if self._is_early:
            offsets = self._act(rates)
        elif self.updates_per_episode == 0:
            offsets = self._behaviour.between(rates)
        else:
            offsets = np.stack([self._behaviour.favoured(rate) for rate in rates.tolist()])
        return self.mdp.space.decode(rates, offsets)

    def _near_policy(
        self, rate: float, noise: float, count: int, rng: np.random.Generator
    ) -> list[Counts]:
        """The most valued of drafts around the policy and near elites."""
        drafts = self._behaviour.draft(rate, noise, self._behaviour.num_drafts * count, rng)
        return self._behaviour.screen(rate, drafts, count)

    def _near_beam(
        self,
        rate: float,
        beam: Sequence[Counts],
        noise: float,
        count: int,
        rng: np.random.Generator,
    ) -> list[Counts]:
        """The most valued of drafts around the beam."""
        offsets = self.mdp.space.encode(np.full(len(beam), rate), beam)
        drafts = np.resize(offsets, (self._behaviour.num_drafts * count, offsets.shape[1]))
        drafts += noise * rng.standard_normal(drafts.shape).astype(np.float32)
        return self._behaviour.screen(rate, drafts, count)

    def _act(self, rates: NDArray[np.floating]) -> Float32s:
        """(N, P) actions of the policy."""
        module = cast(ActorCritic, self.get_module())
        with torch.inference_mode():
            column = torch.from_numpy(np.asarray(rates, np.float32).reshape(-1, 1))
            return module.actor(column).numpy()

    def _value(self, counts: Ints | Floats) -> Float32s:
        """(N,) mean of the critics at keep counts (N, G)."""
        module = cast(ActorCritic, self.get_module())
        log_ratios = torch.from_numpy(self.mdp.space.log_ratios(counts))
        with torch.inference_mode():
            return module.values(log_ratios).mean(dim=0).numpy()

    def _memory(self) -> dict[str, Any]:
        return {"replay": self._replay.get_state(), "behaviour": self._behaviour.get_state()}

    def _set_memory(self, state: dict[str, Any]) -> None:
        self._replay.set_state(state["replay"])
        self._behaviour.set_state(state["behaviour"])
