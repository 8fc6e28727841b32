"""Tunes the agent: every trial is a search with settings of its own, all on one broker.

A trial searches with several seeds, a round of each in turn, and reports their mean after every
round, with a checkpoint of all of them. So Tune can stop it early, start it again from there, or
let it go on with other settings (population-based training).
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.experiment import Trial

from cacp_ray.distributed.broker import BrokeredEvaluator
from cacp_ray.evaluation.measurement import Evaluator
from cacp_ray.files import read_json, write_json
from cacp_ray.tuning.experiment import (
    MAX_FAILURES,
    can_restore,
    check_trials,
    quiet_tune,
    restore,
)
from cacp_ray.tuning.settings import (
    Algorithm,
    Scheduler,
    Settings,
    make_scheduler,
    make_searcher,
)

CURVE_FILE = "curve.json"
SETTINGS_FILE = "settings.json"
TRIAL_CPUS = 0.05  # reserved by a trial; it learns while its candidates are scored
TRIALS_SHARE = 0.25  # of the CPUs, that all trials together reserve at most


class Search(Protocol):
    """One search of a trial."""

    @property
    def evaluations(self) -> int:
        """Distinct candidates so far."""
        ...

    @property
    def top1(self) -> float:
        """Mean over rates of the best so far; 0 for a rate that has none."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def advance(self) -> None:
        """One round, and the learning from it; the folder holds it afterwards."""
        ...


BeginSearch = Callable[[Settings, int, Evaluator, Path], Search]


@dataclass(frozen=True)
class AgentTask:
    """What all trials share.

    Attributes:
        begin: Settings, seed, evaluator, folder -> a search, continued where the folder holds one.
        seeds: Of a trial's searches.
        evaluations: Of each search, unless nothing new is left before.
    """

    begin: BeginSearch
    seeds: tuple[int, ...]
    evaluations: int


@dataclass(frozen=True)
class TrialProgress:
    """Where a trial stands; `top1` and `area` are means over rates and seeds, shares in [0, 1].

    Attributes:
        name: Of the trial.
        settings: Its values, by key path.
        evaluations: Of each of its searches.
        top1: Best so far.
        area: Mean of `top1` over the evaluations so far.
        is_whole: Whether its searches have come to their end; False where Tune stopped it.
        since: Evaluations when it got these settings; above 0 in a population alone.
    """

    name: str
    settings: Settings
    evaluations: int
    top1: float
    area: float
    is_whole: bool
    since: int = 0


# As in finetune.py: Tune pickles its callbacks, the listener is of this driver.
_on_progress: ContextVar[Callable[[TrialProgress], object]] = ContextVar("_on_progress")


class _ProgressCallback(tune.Callback):
    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        _on_progress.get()(_read_progress(_name_trial(trial), result))


def _read_progress(name: str, metrics: Any) -> TrialProgress:
    # The settings that the result was found with: a population may have changed them since.
    values = (metrics[key] for key in ("evaluations", "top1", "area", "is_whole", "since"))
    return TrialProgress(name, json.loads(metrics["settings"]), *values)


def agent_trial(config: dict[str, Any], *, task: AgentTask, broker: Any) -> None:
    """Searches to the end, or until Tune stops it."""
    name = name_trial(tune.get_context().get_trial_id())
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        checkpoint = tune.get_checkpoint()
        curve: list[tuple[int, float]] = []
        if checkpoint is not None:
            with checkpoint.as_directory() as saved:
                shutil.copytree(saved, folder, dirs_exist_ok=True)
            curve = [(number, top1) for number, top1 in read_json(folder / CURVE_FILE)]
        since = note_settings(folder / SETTINGS_FILE, config, curve[-1][0] if curve else 0)
        searches: list[Search] = []
        for seed in task.seeds:
            evaluator = BrokeredEvaluator(broker, name_search(name, seed))
            stack.callback(evaluator.close)  # one that fails leaves nothing queued
            searches.append(task.begin(config, seed, evaluator, folder / f"{seed}"))
        while not all(search.is_done for search in searches):
            for search in searches:
                if not search.is_done:
                    search.advance()
            evaluations = min(search.evaluations for search in searches)
            curve.append((evaluations, float(np.mean([search.top1 for search in searches]))))
            write_json(folder / CURVE_FILE, curve)
            is_whole = all(search.is_done for search in searches)
            metrics = {
                "evaluations": evaluations,
                "top1": curve[-1][1],
                "area": measure_area(curve, task.evaluations if is_whole else evaluations),
                "is_whole": is_whole,
                "settings": json.dumps(config),
                "since": since,
            }
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def note_settings(file: Path, settings: Settings, evaluations: int) -> int:
    """Writes down which settings a search goes on with; returns the evaluations since when."""
    saved = read_json(file) if file.exists() else None
    if saved is None or saved["settings"] != dict(settings):
        saved = {"settings": dict(settings), "since": evaluations}
        write_json(file, saved)
    return int(saved["since"])


def measure_area(curve: Sequence[tuple[int, float]], until: int) -> float:
    """Mean accuracy over the evaluations: each point of the curve counts for those before it.

    Args:
        curve: Evaluations, accuracy.
        until: Evaluations; the last accuracy stays up to there.
    """
    numbers, top1 = np.array([*curve, (max(until, curve[-1][0]), curve[-1][1])], dtype=float).T
    return float(np.diff(numbers, prepend=0.0) @ top1 / numbers[-1])


def tune_agents(
    *,
    task: AgentTask,
    broker: Any,
    space: Mapping[str, Any],
    start: Settings,
    evaluations: int,
    trials: int,
    objective: str,
    algorithm: Algorithm,
    scheduler: Scheduler,
    seed: int,
    max_concurrent: int,
    trial_cpus: float,
    experiment_dir: Path,
    on_progress: Callable[[TrialProgress], object],
) -> list[TrialProgress]:
    """Runs all trials; one that was killed goes on from its last round.

    Args:
        task: Of all trials.
        broker: Handle of `cacp_ray.distributed.broker.start_broker`.
        space: Key path -> domain of Tune.
        start: Settings of the first trial.
        evaluations: Of a search that is not stopped.
        trials: Number, the first included.
        objective: `top1` or `area`, see `TrialProgress`.
        algorithm: `random`, or Optuna's TPE.
        scheduler: `asha` stops poor trials, `pbt` has them go on from better ones with changed
            settings, `none` leaves them alone.
        seed: Of the settings drawn.
        max_concurrent: Trials at once.
        trial_cpus: That each reserves.
        experiment_dir: Of Tune's own files; one that holds trials is continued.
        on_progress: Called with every report of a trial; of a continued tuning, first with the
            last one of each.

    Returns:
        Where each trial ended.

    Raises:
        ArtifactError: What `experiment_dir` holds is damaged.
        EvaluationError: A trial died more often than it is restarted.
    """
    listener = _on_progress.set(on_progress)
    trainable = tune.with_resources(
        tune.with_parameters(agent_trial, task=task, broker=broker), {"cpu": trial_cpus}
    )
    try:
        with quiet_tune():
            if can_restore(experiment_dir):
                tuner = restore(experiment_dir, trainable, dict(space))
                for each in tuner.get_results():
                    if "evaluations" in (each.metrics or {}):
                        on_progress(_read_progress(Path(each.path).name, each.metrics))
            else:
                tuner = tune.Tuner(
                    trainable,
                    param_space=dict(space),
                    tune_config=tune.TuneConfig(
                        metric=objective,
                        mode="max",
                        num_samples=trials,
                        search_alg=make_searcher(algorithm, start, seed, max_concurrent),
                        scheduler=make_scheduler(scheduler, space, start, evaluations),
                        trial_name_creator=_name_trial,
                        trial_dirname_creator=_name_trial,
                    ),
                    run_config=tune.RunConfig(
                        name=experiment_dir.name,
                        storage_path=str(experiment_dir.parent),
                        verbose=0,
                        callbacks=[_ProgressCallback()],
                        failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                        # A trial of a population may be given one that another has left behind.
                        checkpoint_config=tune.CheckpointConfig(
                            num_to_keep=None if scheduler == "pbt" else 2
                        ),
                    ),
                )
            results = tuner.fit()
    finally:
        _on_progress.reset(listener)
    check_trials(results, "the search of")
    return [_read_progress(Path(each.path).name, each.metrics) for each in results]


def _name_trial(trial: Trial) -> str:
    return name_trial(trial.trial_id)


def name_trial(trial_id: str) -> str:
    """As tables and folders call it."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def name_search(trial: str, seed: int) -> str:
    """As the broker knows a trial's search."""
    return f"{trial} {seed}"
