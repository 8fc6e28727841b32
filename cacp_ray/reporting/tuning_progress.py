"""The display of `tune-agent`: the best trials so far, live, or plain lines."""

import time
from collections.abc import Mapping, Sequence
from typing import Literal, Protocol

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from cacp_ray.reporting.progress import Display
from cacp_ray.reporting.summary import format_percent, format_seconds
from cacp_ray.reporting.tuning import format_setting

MOST_TRIALS = 12

Objective = Literal["top1", "area"]


class TrialProgress(Protocol):
    """Where a trial of the agent's tuning stands; `TrialProgress` of the tuning fits."""

    @property
    def name(self) -> str:
        """Of the trial."""
        ...

    @property
    def settings(self) -> Mapping[str, object]:
        """What it tries."""
        ...

    @property
    def evaluations(self) -> int:
        """Of each of its searches."""
        ...

    @property
    def top1(self) -> float:
        """Mean over rates and seeds of the best so far."""
        ...

    @property
    def area(self) -> float:
        """Mean of `top1` over the evaluations so far."""
        ...


class TuningDisplay(Display):
    """The best trials so far, or a line for every round of a trial."""

    def __init__(
        self,
        trials: int,
        objective: Objective,
        *,
        quiet: bool = False,
        console: Console | None = None,
    ) -> None:
        """Shows nothing before the first update.

        Args:
            trials: In all.
            objective: By which trials are ranked.
            quiet: As of `SearchDisplay`.
            console: As of `SearchDisplay`.
        """
        super().__init__(quiet=quiet, console=console)
        self._trials, self._objective = trials, objective
        self._latest: dict[str, TrialProgress] = {}
        self._started = time.monotonic()

    def update(self, progress: TrialProgress) -> None:
        """Shows a trial's round."""
        self._latest[progress.name] = progress
        ranked = sorted(
            self._latest.values(), key=lambda each: (-getattr(each, self._objective), each.name)
        )
        status = (
            f"{len(ranked)} of {self._trials} trials begun, "
            f"{format_seconds(time.monotonic() - self._started)}"
        )
        self._show(Group(tuning_panel(ranked), Text(f"  {status}")), tuning_line(progress))


def tuning_panel(ranked: Sequence[TrialProgress]) -> RenderableType:
    """Table of the best trials."""
    table = Table(box=box.SIMPLE_HEAD)
    heads = ("trial", "evaluations", "best top-1\n(%, mean)", "mean over\ntime (%)", "settings")
    for head in heads:
        table.add_column(head, justify="left" if head == "settings" else "right")
    for each in ranked[:MOST_TRIALS]:
        accuracy = format_percent(each.top1), format_percent(each.area)
        table.add_row(each.name, f"{each.evaluations:,}", *accuracy, _settings(each))
    return table


def tuning_line(progress: TrialProgress) -> str:
    """A trial's round in one line."""
    return (
        f"{progress.name}  {progress.evaluations:,} evaluations  "
        f"best top-1 {format_percent(progress.top1)} %  {_settings(progress)}"
    )


def _settings(progress: TrialProgress) -> str:
    return "  ".join(
        f"{key.partition('.')[2]} {format_setting(value)}"
        for key, value in progress.settings.items()
    )
