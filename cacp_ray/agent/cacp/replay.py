"""All measured episodes: plain arrays, one row an episode.

Accuracy and loss are stored raw and made values when sampled. The critics learn one scale for all
rates, and the actor's gradient is divided by the spread of its own rate, so that an easy rate does
not look like a good action (ours; the published code shares one baseline over all rates). A value
is the mean of the standardised logit of top1 and of -log(loss) on the same scale: the loss of a few
thousand images tells networks apart that top1 does not.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from cacp_ray.agent.cacp.module import LOG_RATIOS, SHARES, SPREADS, VALUES, WEIGHTS
from cacp_ray.agent.parts import EpisodeArrays, draw_rows

MIN_SPREAD = 0.03  # of values at one rate; near the noise of a few thousand images
WORST_VALUE = -4.0  # a collapsed network tells no more than a bad one
MOST_EXTREME = 1e-3  # top1 is taken to be this far from 0 and from 1


class Replay(EpisodeArrays):
    """Episodes of all rates; nothing is ever dropped, some hundred bytes each.

    Attributes:
        rates: (N,) exactly as asked: equal values are one rate.
        offsets: (N, P) offsets of the final keep counts (searching/allocation.py).
        log_ratios: (N, P) log keep ratios.
        shares: (N, P) cost shares.
        top1: (N,) in [0, 1].
        loss: (N,) in nats, 0 where it is unknown.
        images: (N,) images scored, 0 for a failed measurement.
    """

    def __init__(self, num_offsets: int) -> None:
        super().__init__()
        self.rates = np.empty(0)
        self.offsets = np.empty((0, num_offsets), np.float32)
        self.log_ratios = np.empty((0, num_offsets), np.float32)
        self.shares = np.empty((0, num_offsets), np.float32)
        self.top1 = np.empty(0)
        self.loss = np.empty(0)
        self.images = np.empty(0, np.float32)

    def values(self) -> NDArray[np.float64]:
        """(N,) of mean 0 and spread about 1 over all rates; `WORST_VALUE` for failures."""
        valid = self.images > 0
        values = np.full(len(self), WORST_VALUE)
        if valid.any():
            top1 = np.clip(self.top1[valid], MOST_EXTREME, 1 - MOST_EXTREME)
            standardized = _standardized(np.log(top1 / (1 - top1)))
            has_loss = self.loss[valid] > 0
            if len(set(self.loss[valid][has_loss])) > 1:
                # On the scale of the accuracies of the same networks: in a race only the better
                # have a loss, which must not make them average.
                by_top1 = standardized[has_loss]
                by_loss = _standardized(-np.log(self.loss[valid][has_loss]))
                by_loss = by_top1.mean() + (by_top1.std() or 1.0) * by_loss
                standardized[has_loss] = (by_top1 + by_loss) / 2
            values[valid] = standardized
        return np.maximum(values, WORST_VALUE)

    def spreads(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(N,) standard deviation of the values of the same rate, without failures."""
        spreads = np.empty(len(self))
        for rate in np.unique(self.rates):
            mask = self.rates == rate
            known = values[mask & (self.images > 0)]
            spreads[mask] = max(known.std() if len(known) else 0.0, MIN_SPREAD)
        return spreads

    def sample(self, count: int, rng: np.random.Generator) -> dict[str, NDArray[Any]]:
        """The learner's columns of episodes drawn with replacement, float32.

        `WEIGHTS` (N,) of the squared errors: the share of images scored, and 1 for failures.
        """
        values = self.values()
        columns = {
            Columns.OBS: self.rates[:, None],
            Columns.ACTIONS: self.offsets,
            LOG_RATIOS: self.log_ratios,
            SHARES: self.shares,
            VALUES: values,
            SPREADS: self.spreads(values),
            WEIGHTS: np.where(self.images > 0, self.images / max(1.0, self.images.max()), 1),
        }
        return draw_rows(columns, count, rng)


def _standardized(term: NDArray[np.float64]) -> NDArray[np.float64]:
    return (term - term.mean()) / (term.std() or 1.0)
