"""Strategies written as one function: it yields candidates and is sent what they scored.

Methods that go by steps (try, compare, decide, go on) read best from top to bottom. All candidates
of a step are measured side by side. The function is deterministic, so that its measurements are
all the state there is: a restored procedure runs through them again to where it stood.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import asdict
from pathlib import Path

from cacp_ray.evaluation.measurement import Candidate, Measurement, Subnet
from cacp_ray.files import read_json, write_json
from cacp_ray.searching.strategy import Proposal

# Yields the candidates of a step; is sent their measurements, in the same order.
Steps = Generator[list[Proposal], list[Measurement], None]


class Procedure:
    """A strategy from steps: asks for a step's candidates, waits for all of them, goes on."""

    def __init__(self, name: str, steps: Callable[[], Steps]) -> None:
        """Starts nothing yet: the first `ask` does.

        Args:
            name: Of the strategy.
            steps: Starts the procedure; the same measurements must lead to the same candidates.
        """
        self.name = name
        self._start = steps
        self._steps: Steps | None = None
        self._step: list[Proposal] | None = None
        self._found: dict[Subnet, Measurement] = {}
        self._asked: set[Subnet] = set()

    def ask(self, count: int) -> list[Proposal]:
        """Up to `count` candidates of the present step; none while it is awaited, or at the end."""
        self.advance()
        asked: list[Proposal] = []
        for proposal in self._step or []:
            subnet = proposal.keep_counts, proposal.order
            if len(asked) < count and subnet not in self._asked and subnet not in self._found:
                self._asked.add(subnet)
                asked.append(proposal)
        return asked

    def advance(self) -> None:
        """Runs through every step whose candidates are all measured."""
        if self._steps is None:
            self._steps = self._start()
            self._step = next(self._steps, None)
        while self._step is not None:
            keys = [(proposal.keep_counts, proposal.order) for proposal in self._step]
            if any(key not in self._found for key in keys):
                return
            try:
                self._step = self._steps.send([self._found[key] for key in keys])
            except StopIteration:
                self._step = None

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Keeps the measurements; failed ones have a top1 of 0."""
        for candidate, measured in results:
            self._found.setdefault(candidate.subnet, measured)

    def save(self, folder: Path) -> None:
        """Writes what was measured and what is awaited."""
        found = [[*subnet, asdict(measured)] for subnet, measured in self._found.items()]
        awaited = sorted(self._asked - self._found.keys())
        write_json(folder / "state.json", {"found": found, "awaited": awaited})

    def restore(self, folder: Path) -> None:
        """Runs to where `save` stood."""
        state = read_json(folder / "state.json")
        for counts, order, measured in state["found"]:
            self._found[tuple(counts), order] = Measurement(**measured)
        self._asked = {(tuple(counts), order) for counts, order in state["awaited"]}
        self.advance()


def together(parts: Sequence[Steps]) -> Steps:
    """Steps of several procedures side by side: each step waits for all of them."""
    steps = {part: step for part in parts if (step := next(part, None)) is not None}
    while steps:
        measured = yield [proposal for step in steps.values() for proposal in step]
        for part, step in list(steps.items()):
            mine, measured = measured[: len(step)], measured[len(step) :]
            try:
                steps[part] = part.send(mine)
            except StopIteration:
                del steps[part]
