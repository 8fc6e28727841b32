"""The same keep ratio everywhere: one or two candidates a rate, the reference for all others."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget, uniform
from cacp_ray.searching.strategy import Proposal


class UniformStrategy:
    """For every rate: all groups cut alike, then inner groups alike with residual streams whole."""

    name = "uniform"

    def __init__(self, cost_model: CostModel, budget: Budget, rates: Sequence[float]) -> None:
        """Works all proposals out; every rate must be reachable."""
        is_residual = np.array([group.is_residual for group in cost_model.groups])
        everywhere = uniform(budget, rates, np.ones(len(is_residual)))
        inner = uniform(budget, rates, ~is_residual)
        proposals = [
            Proposal(rate, tuple(row))
            for rate, *rows in zip(rates, everywhere.tolist(), inner.tolist(), strict=True)
            for row in rows
        ]
        # Without residual streams both are the same.
        self._proposals = list(dict.fromkeys(proposals))
        self._num_asked = 0

    def ask(self, count: int) -> list[Proposal]:
        """The next proposals; none when all were asked."""
        first, self._num_asked = self._num_asked, self._num_asked + count
        return self._proposals[first : self._num_asked]

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Learns nothing."""

    def save(self, folder: Path) -> None:
        """Writes how far it is."""
        write_json(folder / "state.json", {"asked": self._num_asked})

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        self._num_asked = read_json(folder / "state.json")["asked"]
