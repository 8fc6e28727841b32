"""Hill climb: at every rate, mutate the best allocation measured so far. A baseline for the agent.

It learns nothing across rates and keeps one allocation a rate. An agent has to beat its result with
the same number of evaluations.

Source: an evolution strategy with one parent (Rechenberg, 1973; Beyer and Schwefel, "Evolution
strategies: a comprehensive introduction", 2002). Mutating a few groups at a time, offsets from a
sound prior, and asking while measurements are out are ours.
"""

from typing import Any

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.strategies.offsets import SCALE, Offsets, OffsetStrategy
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts

# These favour the baseline: in a simulation of 300 to 800 evaluations, 0.15-0.25 and 1 to 4 groups
# were the best of the settings tried.
SPREAD = 0.25  # standard deviation of log keep ratio
MAX_MUTATED = 4  # groups


class HillClimb(OffsetStrategy):
    """Mutates each rate's best measured allocation."""

    name = "hill_climb"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self._best: dict[float, tuple[float, Counts]] = {}  # score and keep counts, once measured

    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        """Moves to an allocation strictly better than the best so far."""
        best = self._best.get(candidate.rate)
        if measurement.status == "ok" and (best is None or measurement.score > best[0]):
            self._best[candidate.rate] = measurement.score, candidate.keep_counts

    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of the best so far, with noise on 1 to MAX_MUTATED groups."""
        space, rng = self._space, self._rng
        offsets = np.zeros(space.num_offsets)
        if rate in self._best:
            offsets += space.encode([rate], [self._best[rate][1]])[0]
        groups = rng.permutation(space.num_offsets)[: rng.integers(1, MAX_MUTATED + 1)]
        offsets[groups] += growth * SPREAD / SCALE * rng.standard_normal(len(groups))
        return offsets

    def _get_memory(self) -> Any:
        return [[rate, *allocation] for rate, allocation in self._best.items()]

    def _set_memory(self, memory: Any) -> None:
        self._best = {rate: (score, tuple(counts)) for rate, score, counts in memory}
