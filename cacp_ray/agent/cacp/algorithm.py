"""The conditional agent: one actor and a few critics lead the search at every rate.

Candidates are drafts around the policy and around good allocations, screened by the critics
(behaviour.py). The networks learn from all measurements on one scale for all rates (replay.py,
learner.py). Offsets from a prior make the first candidates sound and carry over between rates
(searching/allocation.py).
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from ray.rllib.policy.sample_batch import SampleBatch

from cacp_ray.agent.cacp.behaviour import Behaviour
from cacp_ray.agent.cacp.learner import CACPLearner
from cacp_ray.agent.cacp.module import REPLACED, ActorCritic
from cacp_ray.agent.cacp.replay import Replay
from cacp_ray.agent.parts import one_thread
from cacp_ray.agent.shell import AgentConfig, PruningAgent
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.allocation import Float32s
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Counts

NUM_CRITICS = 3
LEARNED_FROM = 10  # episodes a rate before the first gradient step


class CACPConfig(AgentConfig[AgentSettings]):
    """RLlib configuration: `CACPConfig().agent(settings, seed=0, num_actions=P).build_algo()`."""

    networks = ActorCritic
    update_rule = CACPLearner

    def __init__(self) -> None:
        super().__init__(CACP)
        self.settings = AgentSettings()

    def agent(self, settings: AgentSettings, *, seed: int = 0, num_actions: int) -> "CACPConfig":
        """Takes the settings, the seed of the weights, and how many groups may be cut."""
        model = {"hidden": settings.hidden, "seed": seed, "num_critics": NUM_CRITICS}
        return self.shape(settings, 1, num_actions, -1.0, **model)


class CACP(PruningAgent):
    """The agent. `attach` it to a problem first; then it asks, is told, and learns."""

    name = "cacp"
    config: CACPConfig  # pyright: ignore[reportIncompatibleVariableOverride]

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

    @one_thread()
    def ask(self, count: int) -> list[Candidate]:
        """Candidates that the critics chose among drafts."""
        return self._behaviour.propose(count)

    def _store(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        rates = [candidate.rate for candidate, _ in results]
        space = self.mdp.space
        counts = np.array([candidate.keep_counts for candidate, _ in results])
        offsets = space.encode(rates, counts)
        measurements = [measurement for _, measurement in results]
        status = np.array([measurement.status for measurement in measurements])
        self._replay.add(
            rates=rates,
            offsets=offsets,
            log_ratios=space.log_ratios(counts),
            shares=space.cost_shares(counts),
            score=[measurement.score for measurement in measurements],
            # A stopped candidate's loss would say more about its images than about the network.
            loss=np.where(status == "ok", [m.loss for m in measurements], np.nan),
            images=np.where(status != "failed", [m.images for m in measurements], 0),
        )
        for row, (candidate, measurement) in zip(offsets, results, strict=True):
            if measurement.status == "ok" and candidate.images is None:
                self._behaviour.adopt(candidate, measurement.score, row)

    def update(self, max_updates: int) -> int:
        """Takes no steps on the first few episodes, which would lead below the prior."""
        return 0 if self._is_early else super().update(max_updates)

    @property
    def _is_early(self) -> bool:
        return self.num_episodes < LEARNED_FROM * len(self._behaviour.num_asked)

    def _sample(self, num_minibatches: int) -> SampleBatch:
        count = num_minibatches * self.minibatch_size
        assert isinstance(self._replay, Replay)
        rows = self._replay.sample(count, self._rng)
        replaced = self._rng.integers(self.mdp.space.num_offsets, size=count)
        return SampleBatch({**rows, REPLACED: replaced})

    def noise(self, rate: float) -> float:
        """Present standard deviation of the action noise at a rate."""
        return self._behaviour.noise(rate)

    @one_thread()
    def policy(self, rates: ArrayLike) -> Ints:
        """The mean of the drafts around the actor and good allocations that the critics favour.

        Before anything was learned, these are the actor's answers, which equal the prior. Without
        learning, they are means of good allocations, interpolated between rates.
        """
        rates = np.asarray(rates, dtype=np.float64)
        if self._is_early:
            offsets = self._act(rates)
        elif self.updates_per_episode == 0:
            offsets = self._behaviour.between(rates)
        else:
            offsets = np.stack([self._behaviour.favoured(rate) for rate in rates.tolist()])
        return self.mdp.space.decode(rates, offsets)

    def _near(
        self,
        rate: float,
        noise: float,
        count: int,
        rng: np.random.Generator,
        beam: Sequence[Counts] = (),
    ) -> list[Counts]:
        """The most valued of drafts around the beam, or around the policy and near elites."""
        num_drafts = self._behaviour.num_drafts * count
        if beam:
            offsets = self.mdp.space.encode(np.full(len(beam), rate), beam)
            drafts = np.resize(offsets, (num_drafts, offsets.shape[1]))
            drafts += noise * rng.standard_normal(drafts.shape).astype(np.float32)
        else:
            drafts = self._behaviour.draft(rate, noise, num_drafts, rng)
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
        return self._behaviour.get_state()

    def _set_memory(self, state: dict[str, Any]) -> None:
        self._behaviour.set_state(state)
