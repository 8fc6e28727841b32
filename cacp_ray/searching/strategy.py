"""What proposes candidates: ask/tell."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.evaluation.measurement import Candidate, Measurement

Counts = tuple[int, ...]  # channels kept, one entry a group


class Strategy(Protocol):
    """Proposes candidates and learns from what they scored."""

    name: str

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` candidates; fewer (even none) where it waits for results or is done."""
        ...

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Takes finished measurements, which may come in any order and from an earlier session."""
        ...

    def save(self, folder: Path) -> None:
        """Writes all state, random state included, into an empty folder."""
        ...

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        ...


@runtime_checkable
class Learner(Protocol):
    """A strategy that learns in steps of its own; the search loop gives it time for them."""

    def learn(self) -> Mapping[str, float]:
        """Learns in well under a second; the figures are empty where nothing was learned."""
        ...


def learn(strategy: Strategy) -> Mapping[str, float]:
    """Lets a strategy learn, if it does."""
    return strategy.learn() if isinstance(strategy, Learner) else {}


def make_candidates(
    rates: Iterable[float], keep_counts: ArrayLike, criterion: str = ""
) -> list[Candidate]:
    """One candidate a rate; keep counts int (B, G)."""
    rows = np.asarray(keep_counts).tolist()
    return [Candidate(rate, tuple(row), criterion) for rate, row in zip(rates, rows, strict=True)]
