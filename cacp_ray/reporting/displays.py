"""Displays of the long work: a live table on a terminal, else plain lines, nothing if quiet."""

import math
import time
from collections.abc import Sequence
from typing import Literal, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.progress import FinetuneProgress, SearchProgress, TrialProgress
from cacp_ray.reporting.summary import DASH, format_percent, format_seconds, format_setting
from cacp_ray.reporting.tables import make_console

PLAIN_SECONDS = 5.0
LIVE_SECONDS = 0.2
BAR_WIDTH = 30
SHORT_BAR_WIDTH = 12
MOST_TRIALS = 12

Objective = Literal["score", "area"]


class Display:
    """A context that shows the latest state in place on a terminal, and prints lines elsewhere."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        """Shows nothing before the first update, and nothing at all if quiet."""
        self._console = console or make_console()
        self._is_quiet = quiet
        is_live = self._console.is_terminal and not self._console.is_dumb_terminal and not quiet
        self._live = Live(console=self._console, auto_refresh=False) if is_live else None
        self._pause = LIVE_SECONDS if is_live else PLAIN_SECONDS
        self._shown_at = -math.inf
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        """Starts the live display."""
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *failure: object) -> None:
        """Leaves the last state on the screen."""
        if self._live is not None:
            self._live.stop()

    def _is_due(self) -> bool:
        """Whether enough time has passed since the last `_show` for another one."""
        return time.monotonic() - self._shown_at >= self._pause

    def _show(self, content: RenderableType, line: str) -> None:
        self._shown_at = time.monotonic()
        if self._live is not None:
            self._live.update(content, refresh=True)
        elif not self._is_quiet:
            self._console.print(Text(line), soft_wrap=True)


class SearchDisplay(Display):
    """The best of every rate, speed and time left."""

    _waiting: SearchProgress | None = None

    def __exit__(self, *failure: object) -> None:
        """Shows the last state and leaves it there."""
        self._flush()
        super().__exit__(*failure)

    def update(self, progress: SearchProgress) -> None:
        """Takes the state of the search, at any pace, and shows it now and then."""
        self._waiting = progress
        if progress.evaluations == progress.total or self._is_due():
            self._flush()

    def _flush(self) -> None:
        if self._waiting is not None:
            self._show(search_panel(self._waiting), search_line(self._waiting))
            self._waiting = None


class FinetuneDisplay(Display):
    """The last epoch of every trial, or a line for each epoch."""

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        super().__init__(quiet=quiet, console=console)
        self._latest: dict[tuple[float, str], FinetuneProgress] = {}

    def update(self, progress: FinetuneProgress) -> None:
        """Shows a finished epoch."""
        self._latest[progress.rate, progress.variant] = progress
        latest = [self._latest[key] for key in sorted(self._latest)]
        self._show(finetune_panel(latest), finetune_line(progress))


class TuningDisplay(Display):
    """The best trials of agent tuning so far, or a line for every round of a trial."""

    def __init__(
        self,
        trials: int,
        objective: Objective,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        """Ranks `trials` trials by the objective."""
        super().__init__(quiet=quiet, console=console)
        self._trials, self._objective = trials, objective
        self._latest: dict[str, TrialProgress] = {}

    def update(self, progress: TrialProgress) -> None:
        """Shows a trial's round."""
        self._latest[progress.name] = progress
        trials = sorted(self._latest.values(), key=lambda trial: trial.name)
        ranked = sorted(trials, key=lambda trial: -getattr(trial, self._objective))
        seconds = format_seconds(time.monotonic() - self._started)
        status = Text(f"  {len(ranked)} of {self._trials} trials begun, {seconds}")
        self._show(Group(tuning_panel(ranked), status), tuning_line(progress))


class ConvertDisplay(Display):
    """Complete shards of `data convert`, speed and time left, in one line."""

    _num_old = _images = 0

    def update(self, done: int, total: int, images: int) -> None:
        """Counts a complete shard of `images` new images; 0 where it existed already.

        The call before the first shard starts the clock.
        """
        if not done:
            self._started = time.monotonic()
            return
        self._num_old += images == 0
        self._images += images
        if done < total and not self._is_due():
            return
        seconds, written = time.monotonic() - self._started, done - self._num_old
        left = seconds / written * (total - done) if written else None
        old = f"{self._num_old:,} were there  " if self._num_old else ""
        speed = self._images / seconds if seconds > 0 else 0.0
        status = (
            f"{done:,}/{total:,} shards  {old}{speed:,.0f} images/s  {format_seconds(left)} left"
        )
        self._show(_bar(done, total, status), f"convert {status}")


def search_panel(progress: SearchProgress) -> RenderableType:
    """Table of the rates above one line of progress."""
    metric = progress.metric
    unit = "(%, search split)" if metric.is_share else ""
    table = _table("rate\n(kept)", f"best {metric.name}\n{unit}", "cost kept\n(%)", "found at\n")
    for rate, best in sorted(progress.best.items()):
        cells = [DASH] * 3
        if best is not None:
            cells = [metric.format(best.score), format_percent(best.cost_kept), f"{best.index:,}"]
        table.add_row(format_rate(rate), *cells)
    total, done = max(progress.total, 1), progress.evaluations
    return Group(table, _bar(done, total, _search_status(progress)))


def search_line(progress: SearchProgress) -> str:
    """State of the search in one line."""
    best = "  ".join(
        f"{format_rate(rate)}: {progress.metric.format(None if record is None else record.score)}"
        for rate, record in sorted(progress.best.items())
    )
    return f"search {_search_status(progress)}  best {progress.metric.heading}: {best}"


def finetune_panel(latest: Sequence[FinetuneProgress]) -> RenderableType:
    """Table with the last epoch of every trial."""
    accuracy = "top-1\n(%, search)"
    table = _table("rate\n(kept)", "epoch\n", "\n", "loss\n", accuracy, "epoch\n(s)", "left\n")
    for trial in latest:
        table.add_row(
            _trial_name(trial),
            f"{trial.epoch}/{trial.epochs}",
            ProgressBar(trial.epochs, trial.epoch, width=SHORT_BAR_WIDTH),
            f"{trial.train_loss:.3f}",
            format_percent(trial.search_score),
            f"{trial.seconds:.1f}",
            format_seconds(trial.seconds * (trial.epochs - trial.epoch)),
        )
    return table


def finetune_line(progress: FinetuneProgress) -> str:
    """A finished epoch in one line."""
    left = format_seconds(progress.seconds * (progress.epochs - progress.epoch))
    return (
        f"fine-tune rate {_trial_name(progress)}  epoch {progress.epoch}/{progress.epochs}  "
        f"loss {progress.train_loss:.3f}  search split {format_percent(progress.search_score)} %  "
        f"{format_seconds(progress.seconds)}  {left} left"
        f"{', from before' if progress.is_restored else ''}"
    )


def tuning_panel(ranked: Sequence[TrialProgress]) -> RenderableType:
    """Table of the best trials; there is at least one."""
    metric = ranked[0].metric
    units = ("(%, mean)", "time (%)") if metric.is_share else ("(mean)", "time")
    heads = f"best {metric.name}\n{units[0]}", f"mean over\n{units[1]}"
    table = _table("trial", "evaluations", *heads)
    table.add_column("settings")
    for trial in ranked[:MOST_TRIALS]:
        scores = metric.format(trial.score), metric.format(trial.area)
        table.add_row(trial.name, f"{trial.evaluations:,}", *scores, _settings(trial))
    return table


def tuning_line(progress: TrialProgress) -> str:
    """A trial's round in one line."""
    return (
        f"{progress.name}  {progress.evaluations:,} evaluations  "
        f"best {progress.metric.heading}: {progress.metric.format(progress.score)}  "
        f"{_settings(progress)}"
    )


def _table(first: str, *heads: str) -> Table:
    """An empty table of right-aligned columns; the first is folded where there is no room."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(first, justify="right", overflow="fold")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _bar(done: int, total: int, status: str) -> Table:
    """A bar before a text; it becomes shorter where the text needs the room."""
    grid = Table.grid(padding=(0, 1))
    grid.add_column()
    grid.add_column()
    grid.add_column(no_wrap=True)
    grid.add_row(" ", ProgressBar(total, done, width=BAR_WIDTH), Text(status))
    return grid


def _trial_name(progress: FinetuneProgress) -> str:
    return f"{format_rate(progress.rate)} {progress.variant}".rstrip()


def _search_status(progress: SearchProgress) -> str:
    evaluators = "1 evaluator" if progress.num_alive == 1 else f"{progress.num_alive} evaluators"
    return (
        f"{progress.evaluations:,}/{progress.total:,} evaluations  "
        f"{progress.evaluations_per_second:.1f}/s  {evaluators}  "
        f"{format_seconds(progress.seconds_left)} left"
    )


def _settings(progress: TrialProgress) -> str:
    return "  ".join(
        f"{key.partition('.')[2]} {format_setting(value)}"
        for key, value in progress.settings.items()
    )
