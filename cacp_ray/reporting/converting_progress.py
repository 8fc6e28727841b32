"""The display of `data convert`: shards that are whole, speed and time left."""

import math
import time

from rich.console import Console
from rich.progress_bar import ProgressBar
from rich.table import Table

from cacp_ray.reporting.progress import BAR_WIDTH, LIVE_SECONDS, PLAIN_SECONDS, Display
from cacp_ray.reporting.summary import format_seconds


class ConvertDisplay(Display):
    """One line, in place on a terminal."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Shows nothing before the first update; arguments as those of `SearchDisplay`."""
        super().__init__(quiet=quiet, console=console)
        self._pause = PLAIN_SECONDS if self._live is None else LIVE_SECONDS
        self._shown_at = -math.inf
        self._started = time.monotonic()
        self._found = self._images = 0

    def update(self, done: int, total: int, images: int) -> None:
        """Takes a shard that is whole; before the first, that they begin.

        Args:
            done: Shards that are.
            total: All shards.
            images: Written into this one; 0 where it was there already.
        """
        if not done:
            self._started = time.monotonic()
            return
        self._found += images == 0
        self._images += images
        now = time.monotonic()
        if done < total and now - self._shown_at < self._pause:
            return
        self._shown_at = now
        seconds, written = now - self._started, done - self._found
        left = seconds / written * (total - done) if written else None
        found = f"{self._found:,} were there  " if self._found else ""
        speed = self._images / seconds if seconds > 0 else 0.0
        status = (
            f"{done:,}/{total:,} shards  {found}{speed:,.0f} images/s  {format_seconds(left)} left"
        )
        panel = Table.grid(padding=(0, 1))
        panel.add_row(" ", ProgressBar(total, done, width=BAR_WIDTH), status)
        self._show(panel, f"convert {status}")
