"""Strategies written as one function: it yields candidates and is sent what they scored.

Methods that go by steps (try, compare, decide, continue) read best from top to bottom. All
candidates of a step are measured side by side. The function is deterministic, so its measurements
are its whole state: a restored procedure runs through them again to where it stood.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import fields
from pathlib import Path

from cacp_ray.evaluation.measurement import Candidate, Measurement, SubnetKey
from cacp_ray.io.files import read_json, write_json

# Yields the candidates of a step; is sent their measurements, in the same order.
Steps = Generator[list[Candidate], list[Measurement], None]


class Procedure:
    """A strategy from steps: asks for a step's candidates, waits for all of them, goes on."""

    def __init__(self, name: str, steps: Callable[[], Steps]) -> None:
        """Keeps `steps`, which the first `ask` starts.

        The same measurements must lead to the same candidates.
        """
        self.name = name
        self._start = steps
        self._steps: Steps | None = None
        self._step: list[Candidate] | None = None
        self._measured: dict[SubnetKey, Measurement] = {}
        self._asked: set[SubnetKey] = set()

    def ask(self, count: int) -> list[Candidate]:
        """Up to `count` candidates of the present step; none while it is awaited, or at the end."""
        self.advance()
        asked: list[Candidate] = []
        for candidate in self._step or []:
            key = candidate.key
            if len(asked) < count and key not in self._asked and key not in self._measured:
                self._asked.add(key)
                asked.append(candidate)
        return asked

    def advance(self) -> None:
        """Runs through every step whose candidates are all measured."""
        if self._steps is None:
            self._steps = self._start()
            self._step = next(self._steps, None)
        while self._step is not None:
            keys = [candidate.key for candidate in self._step]
            if any(key not in self._measured for key in keys):
                return
            try:
                self._step = self._steps.send([self._measured[key] for key in keys])
            except StopIteration:
                self._step = None

    def tell(self, results: Sequence[tuple[Candidate, Measurement]]) -> None:
        """Keeps the measurements; failed ones have the score FAILED."""
        for candidate, measurement in results:
            self._measured.setdefault(candidate.key, measurement)

    def save(self, folder: Path) -> None:
        """Writes the measurements and the candidates that are awaited."""
        names = [field.name for field in fields(Measurement)]  # records have more
        measured = [
            [*key, {name: getattr(measurement, name) for name in names}]
            for key, measurement in self._measured.items()
        ]
        awaited = sorted(self._asked - self._measured.keys())
        write_json(folder / "state.json", {"measured": measured, "awaited": awaited})

    def restore(self, folder: Path) -> None:
        """Runs to where `save` stood."""
        state = read_json(folder / "state.json")
        for counts, criterion, values in state["measured"]:
            self._measured[tuple(counts), criterion] = Measurement(**values)
        self._asked = {(tuple(counts), criterion) for counts, criterion in state["awaited"]}
        self.advance()


def together(parts: Sequence[Steps]) -> Steps:
    """Steps of several procedures side by side: each step waits for all of them."""
    steps = {part: step for part in parts if (step := next(part, None)) is not None}
    while steps:
        measurements = yield [candidate for step in steps.values() for candidate in step]
        for part, step in list(steps.items()):
            mine, measurements = measurements[: len(step)], measurements[len(step) :]
            try:
                steps[part] = part.send(mine)
            except StopIteration:
                del steps[part]
