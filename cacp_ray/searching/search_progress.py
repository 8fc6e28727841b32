"""Where a search stands, and how fast it goes."""

import time
from collections import deque
from dataclasses import dataclass

from cacp_ray.searching.records import EpisodeRecord

WINDOW_SECONDS = 60.0


@dataclass(frozen=True)
class SearchProgress:
    """Where a search stands.

    Attributes:
        evaluations: Distinct candidates measured so far, earlier sessions included.
        total: Distinct candidates to measure.
        best: For each rate the best measurement within its budget, None where there is none.
        evaluations_per_second: Of this process, over the last minute.
        num_alive: Evaluators ready to score.
        seconds_left: Estimate; None before the first measurement of this process.
    """

    evaluations: int
    total: int
    best: dict[float, EpisodeRecord | None]
    evaluations_per_second: float
    num_alive: int
    seconds_left: float | None


class Stopwatch:
    """Time of a search, and its measurements a second of late."""

    def __init__(self) -> None:
        """Starts now."""
        self._before = 0.0
        self._finish_times: deque[float] = deque()
        self._started = time.monotonic()

    def start(self, before: float) -> None:
        """Starts again, after so many seconds of earlier sessions."""
        self._before = before
        self._started = time.monotonic()

    def note_finish(self) -> None:
        """A measurement has come in."""
        self._finish_times.append(time.monotonic())

    @property
    def seconds(self) -> float:
        """Wall time, earlier sessions included."""
        return self._before + time.monotonic() - self._started

    @property
    def per_second(self) -> float:
        """Measurements a second, over the last minute of this session."""
        now = time.monotonic()
        while self._finish_times and self._finish_times[0] < now - WINDOW_SECONDS:
            self._finish_times.popleft()
        window = min(WINDOW_SECONDS, now - self._started)
        return len(self._finish_times) / window if window > 0 else 0.0
