"""Widths from importance scores: one threshold for the whole network, moved until a budget fits."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.searching.budget import Budget, Floats, Ints, spend


def cut_at_threshold(budget: Budget, scores: Sequence[Floats], rates: ArrayLike) -> Ints:
    """(B, G) counts of the channels above the lowest threshold that fits, with the rest spent.

    Scores are (C,) a group, higher is more important, comparable across groups.
    """
    thresholds: Floats = np.append(np.unique(np.concatenate(scores)), np.inf)

    def above(index: int) -> Ints:
        kept: Floats = np.array([np.sum(score >= thresholds[index]) for score in scores], float)
        return budget.floor_to_legal(kept)

    rows: list[Ints] = []
    for rate in np.atleast_1d(np.asarray(rates, dtype=np.float64)):
        limit = budget.limit(rate)
        # The last threshold leaves every group at its smallest count, which fits.
        low, high = -1, len(thresholds) - 1
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if budget.cost(above(middle)) <= limit else (middle, high)
        rows.append(above(high))
    return spend(budget, np.array(rows, dtype=np.float64), rates)


def normalize(scores: Sequence[Floats]) -> list[NDArray[np.float64]]:
    """Scores of every group divided by their L2 norm (Molchanov et al., ICLR 2017, eq. 8)."""
    return [score / max(float(np.linalg.norm(score)), 1e-300) for score in scores]
