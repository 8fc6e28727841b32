"""Everything the agent has seen: plain arrays, one row an episode.

Rewards are stored raw and normalised when sampled, by mean and spread of the episodes of the same
rate: so an easy rate does not look like a good action (ours; the published code shares one baseline
over all rates).
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.searching.allocation import Float32s

MIN_SPREAD = 0.005  # accuracy; near the noise of a few thousand images
WORST_RETURN = -4.0  # spreads below the mean: a collapsed network tells no more than a bad one


class Replay:
    """Episodes of all rates; nothing is ever dropped, some hundred bytes each."""

    def __init__(self, num_offsets: int) -> None:
        self.offsets = np.empty((0, num_offsets), np.float32)
        self.rates = np.empty(0)
        self.rewards = np.empty(0)
        self.images = np.empty(0, np.float32)

    def __len__(self) -> int:
        return len(self.rates)

    def add(
        self, offsets: Float32s, rates: ArrayLike, rewards: ArrayLike, images: ArrayLike
    ) -> None:
        """Adds N episodes.

        Args:
            offsets: (N, P) of the final keep counts.
            rates: (N,) exactly as asked: equal values are one rate.
            rewards: (N,) accuracy in [0, 1]; 0 for a failed measurement.
            images: (N,) that were scored; 0 for a failed measurement.
        """
        self.offsets = np.concatenate([self.offsets, offsets])
        self.rates = np.concatenate([self.rates, np.asarray(rates)])
        self.rewards = np.concatenate([self.rewards, np.asarray(rewards)])
        self.images = np.concatenate([self.images, np.asarray(images, np.float32)])

    def returns(self) -> Float32s:
        """(N,) normalised rewards; failed measurements do not move mean and spread."""
        returns = np.empty(len(self), np.float32)
        for rate in np.unique(self.rates):
            mask = self.rates == rate
            rewards = self.rewards[mask]
            valid = rewards[rewards > 0]
            mean, spread = (valid.mean(), valid.std()) if len(valid) else (0.0, 0.0)
            returns[mask] = (rewards - mean) / max(spread, MIN_SPREAD)
        return np.maximum(returns, WORST_RETURN)

    def sample(self, count: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """Episodes drawn with replacement, every one as likely.

        Returns:
            `rates` (N, 1), `offsets` (N, P), `returns` (N,), `weights` (N,) of the squared errors:
            the share of images scored, and 1 for failures.
        """
        weights = np.where(self.images > 0, self.images / max(1.0, self.images.max()), 1)
        rows = rng.integers(len(self), size=count)
        return {
            "rates": self.rates[rows, None].astype(np.float32),
            "offsets": self.offsets[rows],
            "returns": self.returns()[rows],
            "weights": weights[rows].astype(np.float32),
        }

    def get_state(self) -> dict[str, Any]:
        """All arrays."""
        return dict(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        vars(self).update(state)
