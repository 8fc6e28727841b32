"""The agent of the CACP paper: conditional DDPG, one action a group (Liu et al., 2021).

An episode cuts the groups one after the other (episode.py); its accuracy, shared evenly over its
steps, is the reward (replay.py); actor and critic learn from single transitions (learner.py). Every
episode has a rate drawn from those searched, which the state tells the actor: with one rate this is
AMC (He et al., 2018). The first episodes are random; the others follow the actor with noise that
fades.

`PaperSettings.prior` is a control (ours): the same agent with actions around the prior of
agent/cacp, and the budget spent. docs/agent.md lists all differences.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from ray.rllib.policy.sample_batch import SampleBatch

from cacp_ray.agent.ddpg import episode
from cacp_ray.agent.ddpg.learner import DDPGLearner
from cacp_ray.agent.ddpg.module import SMOOTHING, SequentialActorCritic
from cacp_ray.agent.ddpg.replay import Replay
from cacp_ray.agent.parts import one_thread
from cacp_ray.agent.shell import AgentConfig, PruningAgent
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.mdp import NUM_FEATURES, Float32s
from cacp_ray.searching.settings import PaperSettings
from cacp_ray.searching.strategy import Counts, make_candidates

PRIOR_WARMUP_NOISE = 0.45
REPEAT_NOISE = 0.1  # least noise of an episode that is played again
SMOOTHING_NOISE = 0.2  # on TD3's target actions in [-1, 1]
SMOOTHING_CLIP = 0.5  # largest such noise


class DDPGConfig(AgentConfig[PaperSettings]):
    """RLlib configuration: `DDPGConfig().agent(settings, seed=0).build_algo()`."""

    networks = SequentialActorCritic
    update_rule = DDPGLearner

    def __init__(self) -> None:
        super().__init__(DDPG)
        self.settings = PaperSettings()

    def agent(self, settings: PaperSettings, *, seed: int = 0) -> "DDPGConfig":
        """Takes the settings and the seed of the weights."""
        num_features = NUM_FEATURES if settings.prior else episode.NUM_PAPER_FEATURES
        low = -1.0 if settings.prior else 0.0
        model = {
            "hidden": settings.hidden,
            "num_critics": 2 if settings.twin else 1,
            "prior": settings.prior,
            "seed": seed,
        }
        return self.shape(settings, num_features, 1, low, **model)


class DDPG(PruningAgent):
    """The paper's agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name = "cacp-paper"
    config: DDPGConfig  # pyright: ignore[reportIncompatibleVariableOverride]

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
        self._asked: set[Counts] = set()
        self._run = mdp.play if settings.prior else partial(episode.play, mdp)
        self._trace = mdp.replay if settings.prior else partial(episode.trace, mdp)
        self._num_features = NUM_FEATURES if settings.prior else episode.NUM_PAPER_FEATURES
        self._low = -1.0 if settings.prior else 0.0
        self._replay = Replay(mdp.num_steps, self._num_features)

    @one_thread()
    def ask(self, count: int) -> list[Candidate]:
        """Plays `count` episodes at rates drawn evenly.

        An episode that ends where an earlier one did is played once more with some noise, and its
        second end is taken (ours): a policy without noise would only repeat itself, which ends a
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
        candidates = make_candidates(rates.tolist(), counts)
        self._asked.update(candidate.keep_counts for candidate in candidates)
        return candidates

    def _play(
        self,
        rates: ArrayLike,
        sigma: Floats,
        rng: np.random.Generator,
        is_warmup: NDArray[np.bool_] | None = None,
    ) -> Ints:
        """(B, G) keep counts of episodes with noise of sigma (B,) on the actor's actions.

        Episodes of the warm-up (B,) have random actions instead: uniform, or normal around a prior.
        """

        def act(states: Float32s, step: int) -> Floats:
            actions = episode.truncated_normal(self._act(states), sigma, self._low, rng)
            if is_warmup is None or not is_warmup.any():
                return actions
            if self.config.settings.prior:
                random = np.clip(PRIOR_WARMUP_NOISE * rng.standard_normal(len(actions)), -1, 1)
            else:
                random = rng.random(len(actions))
            return np.where(is_warmup, random, actions)

        return self._run(rates, act)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Stores episodes; warm-up episodes earn no gradient steps."""
        before = self._replay.num_added
        super().tell(results)
        after, warmup = self._replay.num_added, self.schedule.warmup
        self.pending_updates -= self.updates_per_episode * (
            min(after, warmup) - min(before, warmup)
        )

    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        rates = [candidate.rate for candidate, _ in results]
        counts = [candidate.keep_counts for candidate, _ in results]
        states, actions = self._trace(rates, counts)
        self._replay.add(
            states=states[..., : self._num_features],
            actions=actions,
            scores=[m.score if m.status == "ok" else np.nan for _, m in results],
        )

    def _sample(self, num_minibatches: int) -> SampleBatch:
        settings = self.config.settings
        count = num_minibatches * self.minibatch_size
        assert isinstance(self._replay, Replay)
        rows = self._replay.sample(count, settings.targets, settings.baseline, self._rng)
        smoothing = np.zeros((count, 1), np.float32)
        if settings.twin:
            noise = SMOOTHING_NOISE * self._rng.standard_normal((count, 1))
            half_range = (1 - self._low) / 2
            smoothing += half_range * np.clip(noise, -SMOOTHING_CLIP, SMOOTHING_CLIP)
        return SampleBatch({**rows, SMOOTHING: smoothing})

    def noise(self, rate: float) -> float:
        """Standard deviation of the next episode's action noise, the same at every rate."""
        return float(self.schedule.sigma(self.num_asked))

    @one_thread()
    def policy(self, rates: ArrayLike) -> Ints:
        """(B, G) keep counts of episodes without noise."""
        rates = np.asarray(rates, dtype=np.float64)
        # Nothing is random without noise, but draws would move the agent's own random state.
        return self._play(rates, np.zeros(len(rates)), np.random.default_rng(0))

    def _near(
        self,
        rate: float,
        noise: float,
        count: int,
        rng: np.random.Generator,
        beam: Sequence[Counts] = (),
    ) -> list[Counts]:
        """Ends of episodes with noise on the beam's actions, or on the policy's."""
        rates, sigma = np.full(count, rate), np.full(count, noise)
        if beam:
            _, traced = self._trace(np.full(len(beam), rate), beam)
            actions = np.resize(traced, (count, traced.shape[1])).astype(np.float64)

            def act(states: Float32s, step: int) -> Floats:
                return episode.truncated_normal(actions[:, step], sigma, self._low, rng)

            counts = self._run(rates, act)
        else:
            counts = self._play(rates, sigma, rng)
        return [tuple(row) for row in counts.tolist()]

    def _act(self, states: Float32s) -> Float32s:
        """(B,) actions of the policy at states (B, 13)."""
        module = cast(SequentialActorCritic, self.get_module())
        features = torch.from_numpy(np.ascontiguousarray(states[:, : self._num_features]))
        with torch.inference_mode():
            return module.actor(features)[:, 0].numpy()

    def _memory(self) -> dict[str, Any]:
        return {"num_asked": self.num_asked, "asked": set(self._asked)}

    def _set_memory(self, state: dict[str, Any]) -> None:
        self.num_asked = state["num_asked"]
        self._asked = set(state["asked"])
