"""How long a search has run, and how fast it goes."""

import time
from collections import deque

WINDOW_SECONDS = 60.0


class Stopwatch:
    """Time of a search, and its measurements a second over the last minute."""

    def __init__(self, before: float = 0.0) -> None:
        """Starts now, after `before` seconds of earlier sessions."""
        self._before = before
        self._finish_times: deque[float] = deque()
        self._started = time.monotonic()

    def note_finish(self) -> None:
        """Counts a measurement that has come in."""
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
