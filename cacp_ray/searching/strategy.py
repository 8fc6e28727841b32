"""What proposes candidates: ask/tell."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cacp_ray.evaluation.measurement import Candidate, Measurement

Counts = tuple[int, ...]  # channels kept, one entry a group


@dataclass(frozen=True)
class Proposal:
    """A subnet to measure.

    Attributes:
        rate: Whose budget it meets; 1 for a probe that serves no rate of its own.
        keep_counts: Channels kept, one entry a group.
        order: Criterion whose importance order says which channels are kept; empty for the run's.
    """

    rate: float
    keep_counts: Counts
    order: str = ""


class Strategy(Protocol):
    """Proposes candidates and learns from what they scored."""

    name: str

    def ask(self, count: int) -> list[Proposal]:
        """Up to `count` proposals; fewer (even none) where it waits for results or is done."""
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


Tick = Callable[[Strategy], object]  # one turn of the search loop, by an agent that trains
