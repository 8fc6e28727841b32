"""Episodes of the paper's agent: its actions, the replay of episodes, the schedule of the noise.

An action is the keep ratio of one group. The budget lowers it where the rate would get out of
reach with all later groups at their smallest. It does nothing else: the rest of the budget is not
spent. Source: CACP (2021), with AMC's clamp (He et al., 2018, Alg. 1) on the exact cost of groups
that share channels (ours).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.mdp import Act, AllocationMDP, Float32s
from cacp_ray.searching.settings import PaperSettings

NUM_PAPER_FEATURES = 12  # the first features of AllocationMDP's states; the 13th is ours
PUBLISHED_EPISODES = 500  # episodes after the warm-up that the published decay was chosen for
RATIO_TOLERANCE = 1e-3  # channels; a ratio rounded to float32 must not gain one


def play(mdp: AllocationMDP, rates: ArrayLike, act: Act) -> Ints:
    """(B, G) keep counts of episodes of keep ratios in [0, 1]: within budget, perhaps below it."""
    counts = mdp.start(rates)
    for step, group in enumerate(mdp.groups):
        states, _ = mdp.observe(rates, counts, step)
        ratios = np.asarray(act(states, step), dtype=np.float64)
        wanted = np.ceil(ratios * mdp.budget.num_channels[group] - RATIO_TOLERANCE)
        counts = mdp.decide(rates, counts, step, wanted)
    return counts


def trace(
    mdp: AllocationMDP, rates: ArrayLike, keep_counts: Ints | Sequence[Sequence[int]]
) -> tuple[Float32s, Float32s]:
    """States (B, T, 13) and realised keep ratios (B, T) of the episodes that end at keep counts."""
    states, _ = mdp.replay(rates, keep_counts)
    counts = np.asarray(keep_counts, dtype=np.int64)
    ratios = counts[:, mdp.groups] / mdp.budget.num_channels[mdp.groups]
    return states, ratios.astype(np.float32)


def truncated_normal(
    mean: NDArray[np.floating], sigma: Floats, low: float, rng: np.random.Generator
) -> Floats:
    """(B,) draws from normals cut off at `low` and 1; the mean itself where sigma is 0."""
    mean = np.asarray(mean, dtype=np.float64)
    spread = np.maximum(sigma, 1e-12)
    below = _cdf((low - mean) / spread)
    above = _cdf((1 - mean) / spread)
    quantiles = below + (above - below) * rng.random(len(mean))
    drawn = mean + spread * torch.special.ndtri(torch.from_numpy(quantiles)).numpy()
    return np.where(sigma > 0, np.clip(drawn, low, 1), mean)


def _cdf(values: Floats) -> Floats:
    return torch.special.ndtr(torch.from_numpy(values)).numpy()


@dataclass(frozen=True)
class Schedule:
    """Exploration by episode, counted over all rates."""

    warmup: int  # episodes of random actions
    noise: float  # standard deviation at the first episode after the warm-up
    decay: float  # factor on the noise for every later episode

    def sigma(self, episodes: ArrayLike) -> Floats:
        """Standard deviation of the noise on the actor's actions, by episode from 0."""
        return self.noise * self.decay ** np.maximum(np.asarray(episodes) - self.warmup, 0.0)


def make_schedule(settings: PaperSettings, evaluations: int) -> Schedule:
    """The published schedule at 800 evaluations, stretched for other numbers (ours)."""
    warmup = round(settings.warmup_share * evaluations)
    stretch = PUBLISHED_EPISODES / max(1, evaluations - warmup)
    return Schedule(warmup, settings.noise, settings.noise_decay**stretch)
