"""Evolution: at every rate, children of good allocations, crossed and mutated.

Source: regularised evolution without ageing, in its simplest form: a steady-state genetic algorithm
with tournaments, uniform crossover and Gaussian mutation (Eiben and Smith, "Introduction to
Evolutionary Computing", 2015). Offsets from a sound prior, the repair that spends every budget
exactly, and asking while measurements are out are ours.
"""

from typing import Any

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.strategies.hill_climb import SPREAD
from cacp_ray.searching.strategies.offsets import SCALE, Offsets, OffsetStrategy
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts

POPULATION = 20  # best allocations of a rate, which may have children
TOURNAMENT = 3  # members that compete to be a parent
FIRST = 10  # measurements of a rate before there are children
FIRST_SPREAD = 0.4  # standard deviation of log keep ratio before there are children
MUTATED = 2.0  # mutated groups of a child, on average


class Evolution(OffsetStrategy):
    """Breeds each rate's best measured allocations."""

    name = "evolution"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        # Top1 and keep counts, best first.
        self._population: dict[float, list[tuple[float, Counts]]] = {
            rate: [] for rate in problem.rates
        }

    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        """Keeps the best allocations of every rate."""
        members = self._population[candidate.rate]
        member = (measurement.score, candidate.keep_counts)
        if member not in members:
            members.append(member)
            members.sort(key=lambda member: -member[0])
            del members[POPULATION:]

    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of a child of two parents, or noise where there are few measurements."""
        space, rng = self._space, self._rng
        members = self._population[rate]
        if len(members) < FIRST:
            return growth * FIRST_SPREAD / SCALE * rng.standard_normal(space.num_offsets)
        # Members are sorted: the best of a tournament has the lowest place.
        places: list[int] = rng.integers(len(members), size=(2, TOURNAMENT)).min(axis=1).tolist()
        parents = space.encode([rate, rate], [members[place][1] for place in places])
        child = parents[rng.integers(2, size=space.num_offsets), np.arange(space.num_offsets)]
        is_mutated = rng.random(space.num_offsets) < growth * MUTATED / space.num_offsets
        noise = growth * SPREAD / SCALE * rng.standard_normal(space.num_offsets)
        return child + np.where(is_mutated, noise, 0.0)

    def _get_memory(self) -> Any:
        return list(self._population.items())

    def _set_memory(self, memory: Any) -> None:
        self._population = {
            rate: [(score, tuple(counts)) for score, counts in members] for rate, members in memory
        }
