"""All measured episodes: plain arrays, one row an episode.

Scores and losses are stored raw and made values when they are learned from, on one scale for all
rates. A value is the mean of the normal scores of the score and of minus the loss: the loss of a
few thousand images tells networks apart that their accuracy does not. Normal scores are the
quantiles of a standard normal distribution at the ranks (Blom, 1958). They know no unit, so that
the agent learns alike from any metric, and a collapsed network moves no other value.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from cacp_ray.agent.parts import EpisodeArrays

LOG_RATIOS = "log_ratios"
VALUES = "values"
WEIGHTS = "weights"
ARRAYS = ("log_ratios", "score", "loss", "images")
WORST_VALUE = -4.0  # a collapsed network tells no more than a bad one


class Replay(EpisodeArrays):
    """Episodes of all rates; nothing is ever dropped, some hundred bytes each.

    Attributes:
        log_ratios: (N, P) log keep ratios.
        score: (N,) of any unit, higher is better.
        loss: (N,) of any unit, lower is better; NaN where it is unknown.
        images: (N,) images scored, 0 for a failed measurement.
    """

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        self.log_ratios = np.empty((0, num_groups), np.float32)
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

    def columns(self) -> dict[str, NDArray[np.float32]]:
        """What the critics learn from.

        `WEIGHTS` (N,) of the squared errors: the share of images scored, and 1 for failures.
        """
        shares = self.images / max(1.0, float(self.images.max(initial=0)))
        return {
            LOG_RATIOS: self.log_ratios,
            VALUES: self.values().astype(np.float32),
            WEIGHTS: np.where(self.images > 0, shares, 1).astype(np.float32),
        }

    def get_tensors(self) -> dict[str, torch.Tensor]:
        """All arrays, for a file."""
        return {name: torch.from_numpy(getattr(self, name)) for name in ARRAYS}

    def set_tensors(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Takes what `get_tensors` gave."""
        self.set_state({name: tensors[name].numpy() for name in ARRAYS})
        self.num_added = len(self.score)


def _normal_scores(term: NDArray[np.float64]) -> NDArray[np.float64]:
    """(N,) of mean 0 and spread 1 with the ranks of `term`; 0 where all are equal."""
    _, place, counts = np.unique(term, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]  # equal values have their mean rank
    shares = torch.from_numpy((ranks - 0.375) / (len(ranks) + 0.25))
    scores = torch.special.ndtri(shares).numpy()
    return (scores - scores.mean()) / (scores.std() or 1.0)
