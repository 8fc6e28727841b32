"""Which trials Tune stops early: ASHA within each rate, ASHA that spares the start, populations.

Fine-tuning compares the subnets of one rate alone: a small network never competes with a large one.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    ASHAScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search.sample import Categorical, Float

from cacp_ray.io.jsonl import append_line, read_lines
from cacp_ray.tuning.settings import Settings

Scheduler = Literal["asha", "pbt", "none"]

# ASHA has one rung, half way, and stops half of the agents there. They begin to learn after dozens
# of evaluations, and say nothing about their settings before.
REDUCTION = 2
PERTURBATION_ROUNDS = 3


class SchedulerPerRate(FIFOScheduler):
    """Hands each trial's results to the scheduler of its rate; trials start in their order.

    Tune saves schedulers as they began. This one writes all results to a file of the experiment. A
    restored trial tells its results again, so that the trials that go on are compared with all that
    have got there before.
    """

    def __init__(self, make_scheduler: Callable[[], TrialScheduler]) -> None:
        """Takes a function that makes the scheduler of one rate."""
        super().__init__()
        self._make_scheduler = make_scheduler
        self._by_rate: dict[float, TrialScheduler] = {}

    def _of(self, trial: Trial) -> TrialScheduler:
        rate = trial.config["rate"]
        if rate not in self._by_rate:
            self._by_rate[rate] = self._make_scheduler()
        return self._by_rate[rate]

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        """Called by Tune like the methods below; also for restored trials, ended ones included."""
        scheduler = self._of(trial)
        scheduler.on_trial_add(tune_controller, trial)
        # A trial repeats the epoch whose line was cut short.
        for row in read_lines(_journal(tune_controller))[0]:
            if row["trial"] == trial.trial_id:
                scheduler.on_trial_result(tune_controller, trial, row)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Decides whether the trial goes on."""
        told = {key: result[key] for key in ("epoch", "search_score") if key in result}
        append_line(_journal(tune_controller), json.dumps({"trial": trial.trial_id, **told}))
        return self._of(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        """Counts the last result for the other trials of the rate."""
        self._of(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Trial) -> None:
        """Forgets a trial that was never run."""
        self._of(trial).on_trial_remove(tune_controller, trial)

    def on_trial_error(self, tune_controller: Any, trial: Trial) -> None:
        """Forgets a trial that failed for good."""
        self._of(trial).on_trial_error(tune_controller, trial)


def _journal(tune_controller: Any) -> Path:
    """The file of results, where the experiment is now: its folder may have been moved."""
    return Path(tune_controller.experiment_path) / "asha.jsonl"


def make_asha(epochs: int) -> TrialScheduler:
    """ASHA for one rate: the better half goes on at a third of the epochs, at twice that ..."""
    return ASHAScheduler(
        time_attr="epoch",
        metric="search_score",
        mode="max",
        max_t=epochs,
        grace_period=max(1, epochs // 3),
        reduction_factor=2,
    )


class SparingASHA(ASHAScheduler):
    """Stops poor trials, but not the start, which every table compares the others with."""

    def __init__(self, start: Settings, **options: Any) -> None:
        super().__init__(**options)
        self._start = dict(start)

    def on_trial_result(self, tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        """Takes the result for comparisons, then decides."""
        decision = super().on_trial_result(tune_controller, trial, result)
        is_whole = result["evaluations"] >= self._max_t
        return self.CONTINUE if trial.config == self._start and not is_whole else decision


def make_scheduler(
    scheduler: Scheduler, space: Mapping[str, Any], start: Settings, evaluations: int
) -> TrialScheduler | None:
    """Makes the scheduler of an agent tuning; None leaves the trials alone."""
    if scheduler == "asha":
        return SparingASHA(
            start,
            time_attr="evaluations",
            max_t=evaluations,
            grace_period=evaluations // REDUCTION + 1,
            reduction_factor=REDUCTION,
        )
    if scheduler == "pbt":
        return PopulationBasedTraining(
            time_attr="training_iteration",
            perturbation_interval=PERTURBATION_ROUNDS,
            # Given a domain, Tune would multiply choices too by 0.8 or 1.2.
            hyperparam_mutations={
                key: list(domain.categories) if isinstance(domain, Categorical) else domain
                for key, domain in space.items()
            },
            custom_explore_fn=partial(keep_inside, space),
        )
    return None


def keep_inside(space: Mapping[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Moves settings that a population has changed back into the space, to its nearest end."""
    inside = dict(settings)
    for key, domain in space.items():
        if isinstance(domain, Float):
            inside[key] = min(max(settings[key], domain.lower), domain.upper)
    return inside
