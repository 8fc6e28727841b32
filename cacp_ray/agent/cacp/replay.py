"""All measured episodes: plain arrays, one row an episode.

Scores and losses are stored raw and made values when sampled. The critics learn one scale for all
rates, and the actor's gradient is divided by the spread of its own rate, so that an easy rate does
not look like a good action (ours; the published code shares one baseline over all rates). A value
is the mean of the normal scores of the score and of minus the loss, on one scale: the loss of a few
thousand images tells networks apart that their accuracy does not. Normal scores are the quantiles
of a standard normal distribution at the ranks (Blom, 1958). They know no unit, so that the agent
learns alike from any metric, and a collapsed network moves no other value.
"""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from cacp_ray.agent.cacp.module import LOG_RATIOS, SHARES, SPREADS, VALUES, WEIGHTS
from cacp_ray.agent.parts import EpisodeArrays, draw_rows

MIN_SPREAD = 0.03  # of values at one rate; near the noise of a few thousand images
WORST_VALUE = -4.0  # a collapsed network tells no more than a bad one


class Replay(EpisodeArrays):
    """Episodes of all rates; nothing is ever dropped, some hundred bytes each.

    Attributes:
        rates: (N,) exactly as asked: equal values are one rate.
        offsets: (N, P) offsets of the final keep counts (searching/allocation.py).
        log_ratios: (N, P) log keep ratios.
        shares: (N, P) cost shares.
        score: (N,) of any unit, higher is better.
        loss: (N,) of any unit, lower is better; NaN where it is unknown.
        images: (N,) images scored, 0 for a failed measurement.
    """

    def __init__(self, num_offsets: int) -> None:
        super().__init__()
        self.rates = np.empty(0)
        self.offsets = np.empty((0, num_offsets), np.float32)
        self.log_ratios = np.empty((0, num_offsets), np.float32)
        self.shares = np.empty((0, num_offsets), np.float32)
        self.score = np.empty(0)
        self.loss = np.empty(0)
        self.images = np.empty(0, np.float32)

    def values(self) -> NDArray[np.float64]:
        """(N,) of mean 0 and spread about 1 over all rates; `WORST_VALUE` for failures."""
        valid = self.images > 0
        values = np.full(len(self), WORST_VALUE)
        if valid.any():
            ranked = _normal_scores(self.score[valid])
            loss = self.loss[valid]
            has_loss = np.isfinite(loss)
            if len(set(loss[has_loss])) > 1:
                # On the scale of the scores of the same networks: in a race only the better have a
                # loss, which must not make them average.
                by_score = ranked[has_loss]
                by_loss = by_score.mean() + by_score.std() * _normal_scores(-loss[has_loss])
                ranked[has_loss] = (by_score + by_loss) / 2
            values[valid] = ranked
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


def _normal_scores(term: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) of mean 0 and spread 1 with the ranks of `term`; 0 where all are equal."""
    _, place, counts = np.unique(term, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal values have their mean rank
    shares = torch.from_numpy((ranks - 0.375) / (len(ranks) + 0.25))
    scores = torch.special.ndtri(shares).numpy()
    return (scores - scores.mean()) / (scores.std() or 1.0)
