"""Evolution: at every rate, children of good allocations, crossed and mutated.

Source: regularised evolution without ageing, in its simplest form: a steady-state genetic algorithm
with tournaments, uniform crossover and Gaussian mutation (Eiben and Smith, "Introduction to
Evolutionary Computing", 2015). Offsets from a sound prior, the repair that spends every budget
exactly, and asking while measurements are out are ours.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.searching.strategies.hill_climb import SCALE, SPREAD, Counts, Offsets, Proposer
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Proposal

POPULATION = 20  # best of a rate that may have children
TOURNAMENT = 3
FIRST = 10  # measurements of a rate before there are children
FIRST_SPREAD = 0.4  # standard deviation of log keep ratio of these
MUTATED = 2.0  # groups on average


class Evolution:
    """Breeds each rate's best measured allocations; never waits and never ends."""

    name = "evolution"

    def __init__(self, problem: Problem) -> None:
        """Starts from noise around the prior at every rate."""
        self._proposer = Proposer(problem)
        # Top1 and keep counts, best first.
        self._population: dict[float, list[tuple[float, Counts]]] = {
            rate: [] for rate in problem.rates
        }

    def ask(self, count: int) -> list[Proposal]:
        """The next `count` proposals."""
        return self._proposer.propose(count, self._breed)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Lets what is better replace the worst of its rate; failures are ignored."""
        for candidate, measured in results:
            self._proposer.note(candidate)
            members = self._population[candidate.rate]
            member = (measured.top1, candidate.keep_counts)
            if measured.status != "failed" and member not in members:
                members.append(member)
                members.sort(key=lambda each: -each[0])
                del members[POPULATION:]

    def _breed(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of a child of two parents, or noise where there are few measurements."""
        space, rng = self._proposer.space, self._proposer.rng
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

    def save(self, folder: Path) -> None:
        """Writes the population, what was proposed, and the random state."""
        population = list(self._population.items())
        state = {"population": population, "proposer": self._proposer.get_state()}
        write_json(folder / "state.json", state)

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        state = read_json(folder / "state.json")
        self._population = {
            rate: [(top1, tuple(counts)) for top1, counts in members]
            for rate, members in state["population"]
        }
        self._proposer.set_state(state["proposer"])
