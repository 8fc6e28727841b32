"""Displays of the long work: a live table on a terminal, else plain lines, nothing if quiet."""

import math
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cacp_ray.reporting.summary import DASH, format_percent, format_seconds
from cacp_ray.reporting.tables import make_console

PLAIN_SECONDS = 5.0
LIVE_SECONDS = 0.2
BAR_WIDTH = 30


class BestCandidate(Protocol):
    """The best measurement of a rate; `EpisodeRecord` of the search fits."""

    @property
    def index(self) -> int:
        """Of the candidate."""
        ...

    @property
    def top1(self) -> float:
        """Share of images in [0, 1]."""
        ...

    @property
    def cost_kept(self) -> float:
        """Share of the whole network's cost."""
        ...


class SearchProgress(Protocol):
    """Where a search stands; `SearchProgress` of the search fits."""

    @property
    def evaluations(self) -> int:
        """Distinct candidates measured."""
        ...

    @property
    def total(self) -> int:
        """Distinct candidates to measure."""
        ...

    @property
    def best(self) -> Mapping[float, BestCandidate | None]:
        """For each rate the best so far."""
        ...

    @property
    def evaluations_per_second(self) -> float:
        """Lately."""
        ...

    @property
    def num_alive(self) -> int:
        """Evaluators ready to score."""
        ...

    @property
    def seconds_left(self) -> float | None:
        """Estimate."""
        ...


class FinetuneProgress(Protocol):
    """One finished epoch of one subnet; `FinetuneProgress` of the fine-tuning fits."""

    @property
    def rate(self) -> float:
        """Of the subnet."""
        ...

    @property
    def variant(self) -> str:
        """Of the recipe; empty where there is one."""
        ...

    @property
    def epoch(self) -> int:
        """In [1, epochs]."""
        ...

    @property
    def epochs(self) -> int:
        """Of the schedule."""
        ...

    @property
    def train_loss(self) -> float:
        """Mean over the epoch."""
        ...

    @property
    def search_top1(self) -> float:
        """On the search split, share in [0, 1]."""
        ...

    @property
    def seconds(self) -> float:
        """Of this epoch."""
        ...

    @property
    def is_restored(self) -> bool:
        """Whether it was trained before an interruption."""
        ...


class Display:
    """A context that shows the latest state in place on a terminal, and prints lines elsewhere."""

    def __init__(self, *, quiet: bool, console: Console | None) -> None:
        self._console = console or make_console()
        self._is_quiet = quiet
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._live = Live(console=self._console, auto_refresh=False) if is_live else None

    def __enter__(self) -> Self:
        """Starts the live display."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def _show(self, content: RenderableType, line: str) -> None:
        if self._live is not None:
            self._live.update(content, refresh=True)
        elif not self._is_quiet:
            self._console.print(Text(line), soft_wrap=True)


class SearchDisplay(Display):
    """The best of every rate, speed and time left."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Shows nothing before the first update.

        Args:
            quiet: Show nothing at all.
            console: Where to show; standard output by default.
        """
        super().__init__(quiet=quiet, console=console)
        self._pause = PLAIN_SECONDS if self._live is None else LIVE_SECONDS
        self._shown_at = -math.inf
        self._waiting: SearchProgress | None = None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Shows the last state and leaves it there."""
        self._flush()
        super().__exit__(kind, error, traceback)

    def update(self, progress: SearchProgress) -> None:
        """Takes where the search stands; may be called at any pace."""
        self._waiting = progress
        is_last = progress.evaluations == progress.total
        if is_last or time.monotonic() - self._shown_at >= self._pause:
            self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self._show(search_panel(self._waiting), search_line(self._waiting))
            self._shown_at = time.monotonic()
            self._waiting = None


class FinetuneDisplay(Display):
    """The last epoch of every trial, or a line for each epoch."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Shows nothing before the first update; arguments as those of `SearchDisplay`."""
        super().__init__(quiet=quiet, console=console)
        self._latest: dict[tuple[float, str], FinetuneProgress] = {}

    def update(self, progress: FinetuneProgress) -> None:
        """Shows a finished epoch."""
        self._latest[progress.rate, progress.variant] = progress
        latest = [self._latest[key] for key in sorted(self._latest)]
        self._show(finetune_panel(latest), finetune_line(progress))


def search_panel(progress: SearchProgress) -> RenderableType:
    """Table of the rates above one line of progress."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in ("rate\n(kept)", "best top-1\n(%, search split)", "cost kept\n(%)", "found at\n"):
        table.add_column(head, justify="right")
    for rate, best in sorted(progress.best.items()):
        cells = [DASH] * 3
        if best is not None:
            cells = [format_percent(best.top1), format_percent(best.cost_kept), f"{best.index:,}"]
        table.add_row(f"{rate:.2f}", *cells)
    total, done = max(progress.total, 1), progress.evaluations
    status = Table.grid(padding=(0, 1))
    status.add_row(" ", ProgressBar(total, done, width=BAR_WIDTH), _status(progress))
    return Group(table, status)


def search_line(progress: SearchProgress) -> str:
    """Where the search stands in one line."""
    best = "  ".join(
        f"{rate:.2f}: {format_percent(None if record is None else record.top1)}"
        for rate, record in sorted(progress.best.items())
    )
    return f"search {_status(progress)}  best top-1 in %: {best}"


def finetune_panel(latest: list[FinetuneProgress]) -> RenderableType:
    """Table with the last epoch of every trial."""
    table = Table(box=box.SIMPLE_HEAD)
    for head in (
        "rate\n(kept)",
        "epoch\n",
        "\n",
        "loss\n",
        "top-1\n(%, search split)",
        "epoch\n(s)",
        "left\n",
    ):
        table.add_column(head, justify="right")
    for each in latest:
        table.add_row(
            _trial(each),
            f"{each.epoch}/{each.epochs}",
            ProgressBar(each.epochs, each.epoch, width=BAR_WIDTH),
            f"{each.train_loss:.3f}",
            format_percent(each.search_top1),
            f"{each.seconds:.1f}",
            format_seconds(each.seconds * (each.epochs - each.epoch)),
        )
    return table


def finetune_line(progress: FinetuneProgress) -> str:
    """A finished epoch in one line."""
    return (
        f"fine-tune rate {_trial(progress)}  epoch {progress.epoch}/{progress.epochs}  "
        f"loss {progress.train_loss:.3f}  search split {format_percent(progress.search_top1)} %  "
        f"{format_seconds(progress.seconds)}  "
        f"{format_seconds(progress.seconds * (progress.epochs - progress.epoch))} left"
        f"{', from before' if progress.is_restored else ''}"
    )


def _trial(progress: FinetuneProgress) -> str:
    return f"{progress.rate:.2f} {progress.variant}".rstrip()


def _status(progress: SearchProgress) -> str:
    evaluators = "1 evaluator" if progress.num_alive == 1 else f"{progress.num_alive} evaluators"
    return (
        f"{progress.evaluations:,}/{progress.total:,} evaluations  "
        f"{progress.evaluations_per_second:.1f}/s  {evaluators}  "
        f"{format_seconds(progress.seconds_left)} left"
    )
