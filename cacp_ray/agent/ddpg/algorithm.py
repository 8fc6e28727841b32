"""The agent of the CACP paper: conditional DDPG, one action a group (Liu et al., 2021).

An episode cuts the groups one after the other (episode.py); its accuracy, shared evenly over its
steps, is the reward (replay.py); actor and critic learn from single transitions (learner.py). Every
episode has a rate drawn from those searched, which the state tells the actor: with one rate this is
AMC (He et al., 2018). Random episodes first, then the actor with noise that fades.

`PaperSettings.prior` is a control, ours: the same agent with actions around the prior that the
agent of agent/cacp has, and the budget spent. docs/agent.md lists all differences.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from ray.rllib.algorithms.algorithm import Algorithm
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.policy.sample_batch import SampleBatch

from cacp_ray.agent.ddpg import episode
from cacp_ray.agent.ddpg.learner import SMOOTHING, DDPGLearner
from cacp_ray.agent.ddpg.module import SequentialActorCritic
from cacp_ray.agent.ddpg.replay import Replay
from cacp_ray.agent.shell import AgentConfig, PruningAgent
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.mdp import NUM_FEATURES, Float32s
from cacp_ray.searching.settings import PaperSettings
from cacp_ray.searching.strategy import Counts, Proposal

PRIOR_WARMUP_NOISE = 0.45
REPEAT_NOISE = 0.1  # of an episode that ended where an earlier one did
SMOOTHING_NOISE = 0.2  # of TD3's target actions in [-1, 1], cut off at 0.5
SMOOTHING_CLIP = 0.5


class DDPGConfig(AgentConfig):
    """RLlib configuration: `DDPGConfig().agent(settings, seed=0).build_algo()`."""

    def __init__(self, algo_class: type[Algorithm] | None = None) -> None:
        super().__init__(algo_class or DDPG)
        self.settings = PaperSettings()

    def agent(self, settings: PaperSettings, *, seed: int = 0) -> "DDPGConfig":
        """Sets what is particular to this agent.

        Args:
            settings: Of networks, learning and behaviour.
            seed: Of the initial weights.
        """
        self.settings = settings
        num_features = NUM_FEATURES if settings.prior else episode.NUM_PAPER_FEATURES
        low = -1.0 if settings.prior else 0.0
        self.environment(
            observation_space=gym.spaces.Box(0.0, 1.0, (num_features,), np.float32),
            action_space=gym.spaces.Box(low, 1.0, (1,), np.float32),
        )
        model = {
            "hidden": settings.hidden,
            "num_critics": 2 if settings.twin else 1,
            "prior": settings.prior,
            "seed": seed,
        }
        return self.rl_module(model_config=model)

    def get_default_rl_module_spec(self) -> RLModuleSpec:
        """Actor, critics and their targets."""
        return RLModuleSpec(module_class=SequentialActorCritic)

    def get_default_learner_class(self) -> type[DDPGLearner]:
        """The update rule."""
        return DDPGLearner


class DDPG(PruningAgent):
    """The paper's agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name = "cacp-paper"
    config: DDPGConfig

    @classmethod
    def get_default_config(cls) -> DDPGConfig:
        """The paper's settings."""
        return DDPGConfig()

    def _begin(self, rates: Sequence[float], seed: int, evaluations: int) -> None:
        settings, mdp = self.config.settings, self.mdp
        self.minibatch_size = settings.batch_size
        self.updates_per_episode = mdp.num_steps  # as in the published code
        self.schedule = episode.make_schedule(settings, evaluations)
        self.num_asked = 0
        self._rates = tuple(rates)
        self._asked: set[tuple[int, ...]] = set()
        self._num_features = NUM_FEATURES if settings.prior else episode.NUM_PAPER_FEATURES
        self._low = -1.0 if settings.prior else 0.0
        self._replay = Replay(mdp.num_steps, self._num_features)

    def _propose(self, count: int) -> list[Proposal]:
        """One episode each, at rates drawn evenly.

        An episode that ends where an earlier one did is played once more with some noise, and then
        taken as it comes (ours): a policy without noise would only repeat itself, which ends a
        search.
        """
        rates = self._rng.choice(self._rates, count)
        numbers = self.num_asked + np.arange(count)
        is_warmup = numbers < self.schedule.warmup
        sigma = self.schedule.sigma(numbers)
        counts = self._play(rates, sigma, self._rng, is_warmup)
        known, repeats = set(self._asked), np.zeros(count, bool)
        for i, row in enumerate(counts.tolist()):
            repeats[i] = tuple(row) in known
            known.add(tuple(row))
        if repeats.any():
            noisy = np.maximum(sigma, REPEAT_NOISE)[repeats]
            counts[repeats] = self._play(rates[repeats], noisy, self._rng, is_warmup[repeats])
        self.num_asked += count
        proposals = [
            Proposal(rate, tuple(row))
            for rate, row in zip(rates.tolist(), counts.tolist(), strict=True)
        ]
        self._asked.update(proposal.keep_counts for proposal in proposals)
        return proposals

    def _play(
        self,
        rates: ArrayLike,
        sigma: Floats,
        rng: np.random.Generator,
        is_warmup: NDArray[np.bool_] | None = None,
    ) -> Ints:
        """(B, G) keep counts of episodes with noise of sigma (B,) on the actor's actions.

        Args:
            rates: (B,) share of the cost kept.
            sigma: (B,) before the noise is cut off at the range of the actions; 0 for none.
            rng: Of the noise.
            is_warmup: (B,) episodes whose actions are random instead: uniform, or with a prior
                normal around it.
        """
        settings = self.config.settings

        def act(states: Float32s, step: int) -> Floats:
            actions = episode.truncated_normal(self._act(states), sigma, self._low, rng)
            if is_warmup is None or not is_warmup.any():
                return actions
            if settings.prior:
                random = np.clip(PRIOR_WARMUP_NOISE * rng.standard_normal(len(actions)), -1, 1)
            else:
                random = rng.random(len(actions))
            return np.where(is_warmup, random, actions)

        if settings.prior:
            return self.mdp.play(rates, act)
        return episode.play(self.mdp, rates, act)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes; those of the warm-up earn no gradient steps."""
        before = self._replay.num_added
        super().tell(results)
        after, warmup = self._replay.num_added, self.schedule.warmup
        self.pending_updates -= self.updates_per_episode * (
            min(after, warmup) - min(before, warmup)
        )

    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        rates = [candidate.rate for candidate, _ in results]
        counts = [candidate.keep_counts for candidate, _ in results]
        if self.config.settings.prior:
            states, actions = self.mdp.replay(rates, counts)
        else:
            states, actions = episode.trace(self.mdp, rates, counts)
        accuracies = [found.top1 if found.status == "ok" else 0.0 for _, found in results]
        self._replay.add(states[..., : self._num_features], actions, accuracies)

    def _sample(self, num_minibatches: int) -> SampleBatch:
        settings = self.config.settings
        count = num_minibatches * self.minibatch_size
        rows = self._replay.sample(count, settings.targets, settings.baseline, self._rng)
        smoothing = np.zeros((count, 1), np.float32)
        if settings.twin:
            noise = SMOOTHING_NOISE * self._rng.standard_normal((count, 1))
            half_range = (1 - self._low) / 2
            smoothing += half_range * np.clip(noise, -SMOOTHING_CLIP, SMOOTHING_CLIP)
        return SampleBatch(
            {
                Columns.OBS: rows["states"],
                Columns.ACTIONS: rows["actions"],
                Columns.REWARDS: rows["rewards"],
                Columns.NEXT_OBS: rows["next_states"],
                Columns.TERMINATEDS: rows["is_last"],
                SMOOTHING: smoothing,
            }
        )

    @property
    def num_episodes(self) -> int:
        """Episodes in the replay: the last hundred."""
        return len(self._replay)

    def noise(self, rate: float) -> float:
        """Standard deviation of the next episode after the warm-up, the same at every rate."""
        return float(self.schedule.sigma(self.num_asked))

    def _policy(self, rates: ArrayLike) -> Ints:
        rates = np.asarray(rates, dtype=np.float64)
        # Without noise nothing is random, but drawing would move the agent's own random state.
        return self._play(rates, np.zeros(len(rates)), np.random.default_rng(0))

    def _near_policy(
        self, rate: float, noise: float, count: int, rng: np.random.Generator
    ) -> list[Counts]:
        rows = self._play(np.full(count, rate), np.full(count, noise), rng)
        return [tuple(row) for row in rows.tolist()]

    def _near_beam(
        self,
        rate: float,
        beam: Sequence[Counts],
        noise: float,
        count: int,
        rng: np.random.Generator,
    ) -> list[Counts]:
        """The beam's own actions with noise."""
        has_prior, rates = self.config.settings.prior, np.full(len(beam), rate)
        _, actions = (
            self.mdp.replay(rates, beam) if has_prior else episode.trace(self.mdp, rates, beam)
        )
        actions = np.resize(actions, (count, actions.shape[1])).astype(np.float64)
        sigma = np.full(count, noise)

        def act(states: Float32s, step: int) -> Floats:
            return episode.truncated_normal(actions[:, step], sigma, self._low, rng)

        play = self.mdp.play if has_prior else partial(episode.play, self.mdp)
        return [tuple(row) for row in play(np.full(count, rate), act).tolist()]

    def _act(self, states: Float32s) -> Float32s:
        """(B,) actions of the policy at states (B, 13)."""
        module = cast(SequentialActorCritic, self.get_module())
        features = torch.from_numpy(np.ascontiguousarray(states[:, : self._num_features]))
        with torch.inference_mode():
            return module.actor(features)[:, 0].numpy()

    def _memory(self) -> dict[str, Any]:
        return {
            "replay": self._replay.get_state(),
            "num_asked": self.num_asked,
            "asked": set(self._asked),
        }

    def _set_memory(self, state: dict[str, Any]) -> None:
        self._replay.set_state(state["replay"])
        self.num_asked = state["num_asked"]
        self._asked = set(state["asked"])
