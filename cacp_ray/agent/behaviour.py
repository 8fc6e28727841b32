"""What an episode does: the prior, noise around it, a mutated elite, or the policy with noise.

DDPG is off-policy, so good candidates may come from anywhere. Mutating the action vector of a good
allocation finds better ones faster than noise on the policy alone, and since actions are offsets
from the prior, those of one rate carry over to another (ours; CACP uses the policy with noise).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacp_ray.searching.mdp import Act, AllocationMDP, Float32s
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.searching.strategy import Proposal

OWN_RATE_SHARE = 0.75  # of mutations; the others start from an elite of another rate
MAX_MUTATED = 4  # groups
MAX_RETRIES = 8  # for a candidate that was asked before, each with more noise
NOISE_GROWTH = 1.4  # of a retry

Counts = tuple[int, ...]


@dataclass(frozen=True)
class Elite:
    """A good allocation."""

    top1: float
    keep_counts: Counts
    actions: Float32s  # (G,)


class Behaviour:
    """Chooses rates and actions; remembers what was asked and which candidates were best."""

    def __init__(
        self, settings: AgentSettings, rates: Sequence[float], num_steps: int, seed: int
    ) -> None:
        self._settings = settings
        self._num_steps = num_steps
        self._rng = np.random.default_rng([seed, 1])
        self.num_asked = dict.fromkeys(rates, 0)
        self.asked: dict[float, set[Counts]] = {rate: set() for rate in rates}
        self.elites: dict[float, list[Elite]] = {rate: [] for rate in rates}

    def noise(self, rate: float) -> float:
        """Standard deviation of the action noise: every rate has its own clock."""
        settings = self._settings
        decayed = settings.noise * settings.noise_decay ** self.num_asked[rate]
        return max(settings.noise_floor, decayed)

    def propose(self, mdp: AllocationMDP, policy: Act, count: int) -> list[Proposal]:
        """`count` candidates never asked before for their rates, where such are found in time.

        Args:
            mdp: The arithmetic of an episode.
            policy: States (B, F) and step -> actions (B,) in [-1, 1].
            count: Episodes to play, in one batch.
        """
        rates, firsts = self._next_rates(count)
        counts: list[Counts] = [()] * count
        left = np.arange(count)
        for attempt in range(1 + MAX_RETRIES):
            fixed, noise = self._draft([rates[i] for i in left], firsts[left], attempt)

            def act(
                states: Float32s, step: int, fixed: Float32s = fixed, noise: Float32s = noise
            ) -> NDArray[np.floating]:
                means = np.where(np.isnan(fixed[:, step]), policy(states, step), fixed[:, step])
                return np.clip(means + noise[:, step], -1, 1)

            played = mdp.play([rates[i] for i in left], act)
            repeated: list[int] = []
            for i, keep_counts in zip(left, played.tolist(), strict=True):
                counts[i] = tuple(keep_counts)
                if counts[i] in self.asked[rates[i]]:
                    repeated.append(int(i))
                self.asked[rates[i]].add(counts[i])
            left = np.array(repeated, dtype=np.int64)
            if not repeated:
                break
        return [Proposal(rate, found) for rate, found in zip(rates, counts, strict=True)]

    def adopt(self, rate: float, keep_counts: Counts, top1: float, actions: Float32s) -> None:
        """Offers a measured allocation to the elites of its rate."""
        known = self.elites.setdefault(rate, [])
        if all(elite.keep_counts != keep_counts for elite in known):
            known.append(Elite(top1, keep_counts, actions))
            known.sort(key=lambda elite: -elite.top1)
            del known[self._settings.elite_size :]

    def _next_rates(self, count: int) -> tuple[list[float], NDArray[np.int64]]:
        """The rates with the fewest episodes, and how many episodes each had before."""
        rates: list[float] = []
        firsts = np.empty(count, np.int64)
        for i in range(count):
            rate = min(self.num_asked, key=lambda rate: (self.num_asked[rate], rate))
            rates.append(rate)
            firsts[i] = self.num_asked[rate]
            self.num_asked[rate] += 1
        return rates, firsts

    def _draft(
        self, rates: Sequence[float], episodes: NDArray[np.int64], attempt: int
    ) -> tuple[Float32s, Float32s]:
        """Fixed actions (B, G), NaN where the policy acts, and noise (B, G) to add to them."""
        settings, rng = self._settings, self._rng
        shape = (len(rates), self._num_steps)
        fixed = np.full(shape, np.nan, np.float32)
        noise = np.zeros(shape, np.float32)
        for i, (rate, episode) in enumerate(zip(rates, episodes, strict=True)):
            scale = self.noise(rate) * NOISE_GROWTH**attempt
            if episode <= settings.warmup:
                fixed[i] = 0
                if episode > 0 or attempt > 0:
                    noise[i] = scale * rng.standard_normal(self._num_steps)
                continue
            elite = self._choose_elite(rate) if rng.random() < settings.elite_share else None
            if elite is None:
                noise[i] = scale * rng.standard_normal(self._num_steps)
                continue
            fixed[i] = elite.actions
            size = int(rng.integers(1, min(MAX_MUTATED, self._num_steps) + 1))
            groups = rng.choice(self._num_steps, size=size, replace=False)
            noise[i, groups] = scale * rng.standard_normal(size)
        return fixed, noise

    def _choose_elite(self, rate: float) -> Elite | None:
        others = [key for key, found in self.elites.items() if found and key != rate]
        is_own = self._rng.random() < OWN_RATE_SHARE or not others
        key = rate if is_own else others[int(self._rng.integers(len(others)))]
        elites = self.elites[key]
        # The better, the more often: the best of five is drawn nearly every second time.
        return elites[int(len(elites) * self._rng.random() ** 2)] if elites else None

    def get_state(self) -> dict[str, Any]:
        """Clocks, memory, elites and the random state."""
        return {
            "num_asked": dict(self.num_asked),
            "asked": {rate: set(asked) for rate, asked in self.asked.items()},
            "elites": {rate: list(elites) for rate, elites in self.elites.items()},
            "random": self._rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        self.num_asked = dict(state["num_asked"])
        self.asked = {rate: set(asked) for rate, asked in state["asked"].items()}
        self.elites = {rate: list(elites) for rate, elites in state["elites"].items()}
        self._rng.bit_generator.state = state["random"]
