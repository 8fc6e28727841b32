"""ASHA within each rate: a small network never competes with a large one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler


class SchedulerPerRate(FIFOScheduler):
    """Hands each trial's results to the scheduler of its rate; trials start in their order.

    Tune saves schedulers as they began. What this one was told is in a file of the experiment, and
    a restored trial tells it again, so that those that go on are compared with all that had got
    there before.
    """

    def __init__(self, make_scheduler: Callable[[], TrialScheduler]) -> None:
        """Takes what makes the scheduler of one rate."""
        super().__init__()
        self._make_scheduler = make_scheduler
        self._by_rate: dict[float, TrialScheduler] = {}

    def _of(self, trial: Trial) -> TrialScheduler:
        rate = trial.config["rate"]
        if rate not in self._by_rate:
            self._by_rate[rate] = self._make_scheduler()
        return self._by_rate[rate]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Called by Tune, as the others; of restored trials too, those that have ended included."""
        scheduler = self._of(trial)
        scheduler.on_trial_add(tune_controller, trial)
        for result in _read(_journal(tune_controller), trial.trial_id):
            scheduler.on_trial_result(tune_controller, trial, result)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
        told = {key: result[key] for key in ("epoch", "search_top1") if key in result}
        with _journal(tune_controller).open("a") as journal:
            # The line before may have been cut short by a kill.
            journal.write("\n" + json.dumps({"trial": trial.trial_id, **told}))
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """The last result counts for the others of its rate."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """A trial that was never run."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """A trial that failed for good."""
        self._of(trial).on_trial_error(tune_controller, trial)


def _journal(tune_controller: Any) -> Path:
    """A line a result; where the experiment is now, which may have been moved."""
    return Path(tune_controller.experiment_path) / "asha.jsonl"


def _read(journal: Path, trial_id: str) -> list[dict[str, Any]]:
    lines = journal.read_text().splitlines() if journal.exists() else []
    found = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # cut short: the trial repeats that epoch
        if row.get("trial") == trial_id:
            found.append(row)
    return found


def make_asha(epochs: int, grace_epochs: int) -> TrialScheduler:
    """Of one rate: of what reaches epoch grace, 2 grace, 4 grace ... the better half goes on."""
    return ASHAScheduler(
        time_attr="epoch",
        metric="search_top1",
        mode="max",
        max_t=max(epochs, 1),
        grace_period=min(grace_epochs, epochs),
        reduction_factor=2,
    )
