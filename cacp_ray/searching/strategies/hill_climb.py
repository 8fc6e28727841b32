"""Hill climb: at every rate, mutate the best allocation measured so far. A baseline for the agent.

It learns nothing across rates and keeps one allocation a rate: what it reaches with the same number
of evaluations is what an agent has to beat.

Source: an evolution strategy with one parent (Rechenberg, 1973; Beyer and Schwefel, "Evolution
strategies: a comprehensive introduction", 2002). Mutating a few groups at a time, offsets from a
sound prior, and asking while measurements are out are ours.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.searching.allocation import AllocationSpace
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Proposal

SCALE = 0.8  # offset = log(keep ratio / prior) / SCALE
# Chosen in favour of this baseline: in a simulation of a few hundred evaluations (300 to 800),
# 0.15-0.25 and 1 to 4 groups were the best of the settings tried.
SPREAD = 0.25  # standard deviation of log keep ratio
MAX_MUTATED = 4  # groups
MAX_RETRIES = 8  # for keep counts that are known, each with more noise
NOISE_GROWTH = 1.4  # of a retry

Counts = tuple[int, ...]
Offsets = NDArray[np.floating[Any]]


class HillClimb:
    """Proposes mutants of each rate's best measured allocation; never waits and never ends."""

    name = "hill_climb"

    def __init__(self, problem: Problem) -> None:
        """Starts from the prior at every rate."""
        self._proposer = Proposer(problem)
        self._best: dict[float, tuple[float, Counts]] = {}  # top1 and keep counts, once measured

    def ask(self, count: int) -> list[Proposal]:
        """The next `count` proposals."""
        return self._proposer.propose(count, self._mutate)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Moves to what is strictly better than the best so far; failures are ignored."""
        for candidate, measured in results:
            self._proposer.note(candidate)
            best = self._best.get(candidate.rate)
            if measured.status == "ok" and (best is None or measured.top1 > best[0]):
                self._best[candidate.rate] = measured.top1, candidate.keep_counts

    def _mutate(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets of the best so far, those of 1 to MAX_MUTATED groups with noise."""
        space, rng = self._proposer.space, self._proposer.rng
        offsets = np.zeros(space.num_offsets)
        if rate in self._best:
            offsets += space.encode([rate], [self._best[rate][1]])[0]
        groups = rng.permutation(space.num_offsets)[: rng.integers(1, MAX_MUTATED + 1)]
        offsets[groups] += growth * SPREAD / SCALE * rng.standard_normal(len(groups))
        return offsets

    def save(self, folder: Path) -> None:
        """Writes the best, what was proposed, and the random state."""
        best = [[rate, *found] for rate, found in self._best.items()]
        write_json(folder / "state.json", {"best": best, "proposer": self._proposer.get_state()})

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        state = read_json(folder / "state.json")
        self._best = {rate: (top1, tuple(counts)) for rate, top1, counts in state["best"]}
        self._proposer.set_state(state["proposer"])


class Proposer:
    """Serves all rates alike, the prior first, and repeats no keep counts it can avoid.

    What it proposes does not depend on how many are asked for at once.
    """

    def __init__(self, problem: Problem) -> None:
        """Knows no keep counts yet."""
        rates = problem.rates
        self.space = AllocationSpace(problem.budget, problem.prior, SCALE)
        self.rng = np.random.default_rng(problem.seed)  # of whoever draws offsets
        self._num_asked = dict.fromkeys(rates, 0)
        self._known: dict[float, set[Counts]] = {rate: set() for rate in rates}

    def propose(self, count: int, draw: Callable[[float, float], Offsets]) -> list[Proposal]:
        """`count` proposals, each for the rate with the fewest so far, the smaller on a tie.

        Args:
            count: Number of proposals.
            draw: Rate and growth of the noise (1 at first) -> offsets (P,).
        """
        return [self._propose_one(draw) for _ in range(count)]

    def _propose_one(self, draw: Callable[[float, float], Offsets]) -> Proposal:
        rate = min(self._num_asked, key=lambda rate: (self._num_asked[rate], rate))
        known = self._known[rate]
        counts: Counts = tuple(self.space.prior([rate])[0].tolist())
        for attempt in range(1 + MAX_RETRIES):
            if counts not in known:
                break
            offsets = draw(rate, NOISE_GROWTH**attempt)
            counts = tuple(self.space.decode([rate], offsets[None])[0].tolist())
        self._num_asked[rate] += 1
        known.add(counts)
        return Proposal(rate, counts)

    def note(self, candidate: Candidate) -> None:
        """Counts a measured candidate as proposed, also where an earlier session proposed it."""
        if candidate.keep_counts not in self._known[candidate.rate]:
            self._num_asked[candidate.rate] += 1
            self._known[candidate.rate].add(candidate.keep_counts)

    def get_state(self) -> dict[str, Any]:
        """What was proposed and the random state, as JSON can hold it."""
        return {
            "asked": [
                [rate, count, sorted(self._known[rate])] for rate, count in self._num_asked.items()
            ],
            "random": self.rng.bit_generator.state,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        self._num_asked = {rate: count for rate, count, _ in state["asked"]}
        self._known = {rate: set(map(tuple, known)) for rate, _, known in state["asked"]}
        self.rng.bit_generator.state = state["random"]
