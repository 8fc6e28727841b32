"""The same keep ratio everywhere: one or two candidates a rate, the reference for all others."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.io.files import read_json, write_json
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget, uniform
from cacp_ray.searching.strategy import make_candidates


class UniformStrategy:
    """Cuts for every rate all groups alike, then inner groups alike with residual streams whole."""

    name = "uniform"

    def __init__(self, cost_model: CostModel, budget: Budget, rates: Sequence[float]) -> None:
        is_residual = np.array([group.is_residual for group in cost_model.groups])
        everywhere = make_candidates(rates, uniform(budget, rates, np.ones(len(is_residual))))
        inner = make_candidates(rates, uniform(budget, rates, ~is_residual))
        # Without residual streams both are the same.
        pairs = zip(everywhere, inner, strict=True)
        self._candidates = list(dict.fromkeys(itertools.chain.from_iterable(pairs)))
        self._num_asked = 0

    def ask(self, count: int) -> list[Candidate]:
        """The next candidates; none when all were asked for."""
        first, self._num_asked = self._num_asked, self._num_asked + count
        return self._candidates[first : self._num_asked]

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Learns nothing."""

    def save(self, folder: Path) -> None:
        """Writes how many candidates were asked for."""
        write_json(folder / "state.json", {"asked": self._num_asked})

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        self._num_asked = read_json(folder / "state.json")["asked"]
