"""What strategies share that search the offsets of each rate from a sound prior."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.io.files import read_json, write_json
from cacp_ray.searching.allocation import AllocationSpace
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategy import Counts

SCALE = 0.8  # offset = log(keep ratio / prior) / SCALE
MAX_RETRIES = 8  # for keep counts that are known, each with more noise
NOISE_GROWTH = 1.4  # factor on the noise of a retry

Offsets = NDArray[np.floating[Any]]


class OffsetStrategy(ABC):
    """Serves all rates alike, the prior first, and avoids keep counts proposed before.

    It never waits and never ends. Its candidates do not depend on how many are asked for at once.
    """

    def __init__(self, problem: Problem) -> None:
        self._space = AllocationSpace(problem.budget, problem.prior, SCALE)
        self._rng = np.random.default_rng(problem.seed)
        self._num_asked = dict.fromkeys(problem.rates, 0)
        self._known: dict[float, set[Counts]] = {rate: set() for rate in problem.rates}

    @abstractmethod
    def _draw(self, rate: float, growth: float) -> Offsets:
        """(P,) offsets to propose, with noise times `growth`, which is 1 at first."""

    @abstractmethod
    def _note(self, candidate: Candidate, measurement: Measurement) -> None:
        """Learns from a measurement that did not fail."""

    @abstractmethod
    def _get_memory(self) -> Any:
        """What was learned, ready for JSON."""

    @abstractmethod
    def _set_memory(self, memory: Any) -> None:
        """Takes what `_get_memory` gave."""

    def ask(self, count: int) -> list[Candidate]:
        """`count` candidates, each for the rate with the fewest so far, the smaller on a tie."""
        return [self._propose() for _ in range(count)]

    def _propose(self) -> Candidate:
        rate = min(self._num_asked, key=lambda rate: (self._num_asked[rate], rate))
        known = self._known[rate]
        counts: Counts = tuple(self._space.prior([rate])[0].tolist())
        for attempt in range(1 + MAX_RETRIES):
            if counts not in known:
                break
            offsets = self._draw(rate, NOISE_GROWTH**attempt)
            counts = tuple(self._space.decode([rate], offsets[None])[0].tolist())
        self._num_asked[rate] += 1
        known.add(counts)
        return Candidate(rate, counts)

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Counts candidates as proposed, even if an earlier session proposed them, and learns."""
        for candidate, measurement in results:
            if candidate.keep_counts not in self._known[candidate.rate]:
                self._num_asked[candidate.rate] += 1
                self._known[candidate.rate].add(candidate.keep_counts)
            if measurement.status != "failed":
                self._note(candidate, measurement)

    def save(self, folder: Path) -> None:
        """Writes the proposed keep counts, what was learned, and the random state."""
        state = {
            "asked": [[rate, n, sorted(self._known[rate])] for rate, n in self._num_asked.items()],
            "memory": self._get_memory(),
            "random": self._rng.bit_generator.state,
        }
        write_json(folder / "state.json", state)

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        state = read_json(folder / "state.json")
        self._num_asked = {rate: num for rate, num, _ in state["asked"]}
        self._known = {rate: set(map(tuple, known)) for rate, _, known in state["asked"]}
        self._set_memory(state["memory"])
        self._rng.bit_generator.state = state["random"]
