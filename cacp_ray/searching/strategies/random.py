"""Random Pruning: widths drawn at random, the budget spent exactly. The baseline to beat.

Source: Li et al., "Revisiting Random Channel Pruning for Neural Network Compression", CVPR 2022,
arXiv 2205.05676. They reject widths outside a tolerance of the budget; we scale the drawn widths to
the budget and spend the rest exactly (ours).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.io.files import read_json, write_json
from cacp_ray.searching.budget import Budget, scale_to_budget, spend
from cacp_ray.searching.strategy import make_candidates


class RandomStrategy:
    """Proposes for one rate after the other; candidate i depends on (seed, i) alone."""

    name = "random"

    def __init__(self, budget: Budget, rates: Sequence[float], seed: int) -> None:
        self._budget = budget
        self._rates = tuple(rates)
        self._seed = seed
        self._num_asked = 0

    def ask(self, count: int) -> list[Candidate]:
        """The next `count` candidates; the strategy never waits and never ends."""
        first, self._num_asked = self._num_asked, self._num_asked + count
        numbers = range(first, self._num_asked)
        rates = [self._rates[number % len(self._rates)] for number in numbers]
        smallest = self._budget.min_counts / self._budget.num_channels  # (G,)
        ratios = np.array(
            [np.random.default_rng((self._seed, number)).uniform(smallest, 1) for number in numbers]
        ).reshape(count, len(smallest))
        counts = spend(self._budget, scale_to_budget(self._budget, ratios, rates), rates)
        return make_candidates(rates, counts)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Learns nothing."""

    def save(self, folder: Path) -> None:
        """Writes the seed and how many candidates were asked for."""
        write_json(folder / "state.json", {"seed": self._seed, "asked": self._num_asked})

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        state = read_json(folder / "state.json")
        self._seed, self._num_asked = state["seed"], state["asked"]
