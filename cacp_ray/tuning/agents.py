"""Tunes the agent: every trial searches with settings of its own, and all share one broker.

A trial runs one search for each seed, a round of each in turn. After every round it reports the
mean of all and a checkpoint of all. So Tune can stop it early, start it again from there, or let it
go on with other settings (population-based training).
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ray import tune
from ray.tune.experiment import Trial

from cacp_ray.distributed.broker import BrokeredEvaluator
from cacp_ray.evaluation.measurement import TOP1, Evaluator, Metric
from cacp_ray.io.files import parse_json, read_json, write_json
from cacp_ray.io.labels import Selector
from cacp_ray.reporting.progress import TrialProgress
from cacp_ray.tuning.experiment import (
    ReportCallback,
    TrialFiles,
    as_resources,
    check_trials,
    make_run_config,
    restore,
    running_tune,
)
from cacp_ray.tuning.scheduler import Scheduler, make_scheduler
from cacp_ray.tuning.settings import Algorithm, Settings, make_searcher

CURVE_FILE = "curve.json"
SETTINGS_FILE = "settings.json"
TRIAL_CPUS = 0.05  # that a trial reserves; it learns while its candidates are scored
TRIALS_SHARE = 0.25  # of all CPUs, the most that all trials reserve together


class Search(Protocol):
    """One search of a trial."""

    @property
    def evaluations(self) -> int:
        """Distinct candidates so far."""
        ...

    @property
    def score(self) -> float:
        """Mean over rates of the best score so far."""
        ...

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        ...

    def advance(self) -> None:
        """Searches for one round, learns from it, and saves all in the search's folder."""
        ...


# Settings, seed, evaluator, folder -> a search, continued where the folder holds one.
BeginSearch = Callable[[Settings, int, Evaluator, Path], Search]


@dataclass(frozen=True)
class AgentTask:
    """What all trials share."""

    begin: BeginSearch
    seeds: tuple[int, ...]  # one for each search of a trial
    evaluations: int  # length of each search, unless nothing new is left earlier
    metric: Metric = TOP1  # what scores measure


def _read_progress(name: str, metrics: Any, metric: Metric) -> TrialProgress:
    # The settings of this report; a population may have changed the trial's since.
    values = (metrics[key] for key in ("evaluations", "score", "area", "is_whole", "since"))
    return TrialProgress(name, parse_json(metrics["settings"]), *values, metric=metric)


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
            curve = [(number, score) for number, score in read_json(folder / CURVE_FILE)]
        since = note_settings(folder / SETTINGS_FILE, config, curve[-1][0] if curve else 0)
        searches: list[Search] = []
        for seed in task.seeds:
            evaluator = BrokeredEvaluator(broker, name_search(name, seed))
            stack.callback(evaluator.close)  # a trial that fails leaves nothing queued
            searches.append(task.begin(config, seed, evaluator, folder / f"{seed}"))
        while not all(search.is_done for search in searches):
            for search in searches:
                if not search.is_done:
                    search.advance()
            evaluations = min(search.evaluations for search in searches)
            curve.append((evaluations, float(np.mean([search.score for search in searches]))))
            write_json(folder / CURVE_FILE, curve)
            is_whole = all(search.is_done for search in searches)
            metrics = {
                "evaluations": evaluations,
                "score": curve[-1][1],
                "area": measure_area(curve, task.evaluations if is_whole else evaluations),
                "is_whole": is_whole,
                "settings": json.dumps(config),
                "since": since,
            }
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))


def note_settings(file: Path, settings: Settings, evaluations: int) -> int:
    """Notes the settings of a search; returns how many evaluations it had when it got them."""
    saved = read_json(file) if file.exists() else None
    if saved is None or saved["settings"] != dict(settings):
        saved = {"settings": dict(settings), "since": evaluations}
        write_json(file, saved)
    return int(saved["since"])


def measure_area(curve: Sequence[tuple[int, float]], until: int) -> float:
    """Mean accuracy over the evaluations: a point of the curve counts for those before it.

    The curve has pairs of evaluations and accuracy; the last accuracy holds `until` evaluations.
    """
    numbers, score = np.array([*curve, (max(until, curve[-1][0]), curve[-1][1])], dtype=float).T
    return float(np.diff(numbers, prepend=0.0) @ score / numbers[-1])


def tune_agents(
    *,
    task: AgentTask,
    broker: Any,  # handle of `start_broker`
    space: Mapping[str, Any],  # domains of Tune by key path, see `make_domain`
    start: Settings,  # settings of the first trial
    trials: int,  # the first included
    objective: str,  # `score` or `area`, see `TrialProgress`
    algorithm: Algorithm,
    scheduler: Scheduler,
    seed: int,
    max_concurrent: int,  # trials at once
    trial_cpus: float,
    labels: Selector,  # of the nodes that trials run on
    files: TrialFiles,
    on_progress: Callable[[TrialProgress], object],
) -> list[TrialProgress]:
    """Runs all trials and returns the last report of each.

    A trial that was killed goes on from its last round, a tuning from its `files`.
    `on_progress` takes every report of a trial; a continued tuning begins with the last of each.

    Raises:
        ArtifactError: The files are damaged.
        EvaluationError: A trial died more often than it is restarted.
    """
    read = partial(_read_progress, metric=task.metric)
    trainable = tune.with_resources(
        tune.with_parameters(agent_trial, task=task, broker=broker),
        as_resources(trial_cpus, 0.0, labels),
    )
    with running_tune(lambda trial, metrics: on_progress(read(_name_trial(trial), metrics)), files):
        if files.can_restore():
            tuner = restore(files, trainable, dict(space))
            for result in tuner.get_results():
                if "evaluations" in (result.metrics or {}):
                    on_progress(read(Path(result.path).name, result.metrics))
        else:
            tuner = tune.Tuner(
                trainable,
                param_space=dict(space),
                tune_config=tune.TuneConfig(
                    metric=objective,
                    mode="max",
                    num_samples=trials,
                    search_alg=make_searcher(algorithm, start, seed, max_concurrent),
                    scheduler=make_scheduler(scheduler, space, start, task.evaluations),
                    trial_name_creator=_name_trial,
                    trial_dirname_creator=_name_trial,
                ),
                # A population hands on checkpoints that their own trials have left behind.
                run_config=make_run_config(
                    files, [ReportCallback()], None if scheduler == "pbt" else 2
                ),
            )
        results = tuner.fit()
    check_trials(results, "the search of")
    return [read(Path(result.path).name, result.metrics) for result in results]


def _name_trial(trial: Trial) -> str:
    return name_trial(trial.trial_id)


def name_trial(trial_id: str) -> str:
    """The name of a trial in tables and folders."""
    return f"trial-{trial_id.rpartition('_')[2]}"


def name_search(trial: str, seed: int) -> str:
    """The name under which the broker knows a trial's search."""
    return f"{trial} {seed}"
