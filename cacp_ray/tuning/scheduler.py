"""ASHA within each rate: a small network never competes with a large one."""

from collections.abc import Callable
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler


class SchedulerPerRate(FIFOScheduler):
    """Hands each trial's results to the scheduler of its rate; trials start in their order."""

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
        """Called by Tune, as the others."""
        self._of(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Whether the trial goes on."""
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
