"""Tuning of the agent: from a YAML file to the settings that search best on the user's network.

The folder holds config.yaml, environment.json, `cache/` (measurements), `tune/` (Ray Tune's own;
with a storage, trials.json names their place there), and at the end trials.csv, result.json,
report.html and best.yaml, which `cacp-ray search` takes.
"""

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cacp_ray.config.agent_tuning import (
    AgentTuningConfig,
    as_text,
    read_settings,
    with_settings,
)
from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.saved import is_run, open_folder
from cacp_ray.evaluation.task_scorer import make_scorer
from cacp_ray.io.clock import Clock
from cacp_ray.io.environment import describe_environment, with_same_versions
from cacp_ray.io.files import read_json, write_file, write_json, write_yaml
from cacp_ray.reporting.progress import TrialProgress
from cacp_ray.reporting.tuning import write_tuning_report
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.workflows.evaluators import find_gpu_share, join, key_of_run, scorer_arguments
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.storage import (
    check_trials_place,
    make_push,
    note_trials_place,
    open_for_tuning,
    training_into,
)
from cacp_ray.workflows.strategy import check_strategy
from cacp_ray.workflows.trial_search import begin_search

logger = logging.getLogger(__name__)

OnProgress = Callable[[TrialProgress], object]


def tune_agent(
    config: AgentTuningConfig | dict[str, Any] | str | Path,
    folder: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    storage: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Finds the agent's settings that search best on a network.

    Args:
        config: A configuration, its content, or the path of its YAML file.
        folder: Default: runs/NAME.
        resume: Whether to go on with what `folder` holds.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, else starts a local Ray.
        storage: Folder, s3:// or gs:// URI that gets a copy of the folder. Trials write there, so
            nodes need no common folder. With `resume`, a tuning is fetched from there where the
            folder does not hold it, or begun where there is none.
        on_progress: Called with every round of a trial.

    Returns:
        The content of result.json.

    Raises:
        CacpError: Bad input, before anything is written, or a trial that failed too often.
    """
    settings = (
        config if isinstance(config, AgentTuningConfig) else load_config(AgentTuningConfig, config)
    )
    where = Path(folder) if folder is not None else Path("runs") / settings.name
    mirror = None if storage is None else open_for_tuning(str(storage), where, settings, resume)
    is_first = mirror is not None and mirror.config is None and not is_run(where)
    open_folder(where, settings, resume=resume and not is_first)
    if (where / "result.json").exists():
        write_tuning_report(where)
        if mirror is not None:
            mirror.finish(where)
        return read_json(where / "result.json")
    with training_into(mirror, where):
        _run_tuning(settings, where, address, mirror, on_progress or (lambda progress: None))
        write_tuning_report(where)
    return read_json(where / "result.json")


def _run_tuning(
    config: AgentTuningConfig,
    folder: Path,
    address: str | None,
    mirror: RunMirror | None,
    on_progress: OnProgress,
) -> None:
    """Runs all trials and writes what came of them; continues what the folder holds."""
    from cacp_ray.distributed.cluster import check_address
    from cacp_ray.tuning.experiment import TrialFiles
    from cacp_ray.tuning.settings import check_algorithm

    files = TrialFiles(*mirror.trials("tune")) if mirror else TrialFiles(f"{folder.resolve()}/tune")
    trials_place = files.path if mirror else None
    check_trials_place(folder, trials_place)
    clock, is_begun = Clock(), is_run(folder)
    with ExitStack() as stack:
        if is_begun:
            stack.enter_context(RunDirectory(folder).locked())
        with clock.phase("start"):
            check_address(address)
            check_algorithm(config.algorithm)
            search = with_settings(config.search, {}, evaluations=config.evaluations)
            setup = Setup.create(search)
            check_strategy(setup)
            setup = setup.prepare()
            join(search, address)
            gpus = find_gpu_share(setup)
        if not is_begun:
            stack.enter_context(RunDirectory(folder).locked())
        write_yaml(folder / "config.yaml", resolved(config))
        write_json(folder / "environment.json", describe_environment(config.seed))
        note_trials_place(folder, trials_place)
        if mirror is not None:
            mirror.finish(folder)  # before the trials, so that no other tuning begins there
        push = make_push(mirror, folder)

        def note(progress: TrialProgress) -> None:
            push()
            on_progress(progress)

        with clock.phase("trials"):
            trials, status, counts = _run_trials(config, setup, gpus, folder, files, note)
    rows = rank_trials(
        [
            {
                **{name: value for name, value in vars(trial).items() if name != "metric"},
                "settings": dict(trial.settings),
                "known": known_share(trial.name, counts),
            }
            for trial in trials
        ],
        config.objective,
    )
    result = {
        "name": config.name,
        "objective": config.objective,
        "metric": vars(setup.task.metric),
        "task": search.task,
        "rates": search.rates,
        "start": {
            key: as_text(value) for key, value in read_settings(search, config.space).items()
        },
        "trials": rows,
        "answers": {name: getattr(status, name) for name in ("scored", "cached", "joined")},
        "seconds": clock.seconds,
    }
    write_yaml(folder / "best.yaml", resolved(with_settings(config.search, rows[0]["settings"])))
    write_file(folder / "trials.csv", partial(_write_table, rows))
    write_json(folder / "result.json", result)


def rank_trials(rows: Sequence[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """The best first: trials that came to their end, then those stopped, the latest first."""
    return sorted(
        rows,
        key=lambda row: (
            not row["is_whole"],
            # An end may be early, where nothing new is left to try.
            0 if row["is_whole"] else -row["evaluations"],
            -row[objective],
            # Trials of a population share results: first the one whose settings made them.
            row["since"],
        ),
    )


def trials_at_once(config: AgentTuningConfig, num_evaluators: int) -> int:
    """Two for every evaluator, so that none waits for a trial that learns.

    A population needs all its trials. Optuna draws settings from the trials that have ended, so it
    never begins more than a quarter of them together.
    """
    if config.scheduler == "pbt":
        return config.trials
    most = max(1, config.trials // 4) if config.algorithm == "optuna" else config.trials
    return min(most, 2 * num_evaluators)


def _run_trials(
    config: AgentTuningConfig,
    setup: Setup,
    gpus: float,
    folder: Path,
    files: Any,  # where trials write: a `TrialFiles`, whose module imports Ray
    on_progress: OnProgress,
) -> tuple[list[TrialProgress], Any, dict[str, tuple[int, int]]]:
    """Where each trial ended, how the broker answered, and by search what it asked."""
    from cacp_ray.distributed.broker import read_answers, start_broker, stop_broker
    from cacp_ray.distributed.nodes import find_room, read_free, read_nodes
    from cacp_ray.tuning.agents import TRIAL_CPUS, TRIALS_SHARE, AgentTask, tune_agents
    from cacp_ray.tuning.settings import make_domain

    search = setup.config
    cpus = search.cluster.cpus_per_evaluator
    wanted = search.cluster.max_evaluators
    useful = search.evaluations * config.trials * len(config.seeds)
    labels = search.cluster.label_selector
    nodes, free = read_nodes(labels), read_free()
    room = find_room(nodes, free, cpus, gpus, wanted, useful)
    if wanted is not None and room.total > max(1, room.now):
        # Evaluators that wait for room would take what the trials need.
        room = find_room(nodes, free, cpus, gpus, max(1, room.now), useful)
    num_evaluators = room.total
    max_concurrent = trials_at_once(config, num_evaluators)
    trial_cpus = min(TRIAL_CPUS, TRIALS_SHARE * cpus * num_evaluators / max_concurrent)
    logger.info(
        "%d evaluators, %d of %d trials at once", num_evaluators, max_concurrent, config.trials
    )
    broker = start_broker(
        with_same_versions(make_scorer),
        scorer_arguments(setup, gpus),
        num_evaluators=room.on_cpus,
        num_gpu_evaluators=room.on_gpus,
        gpus_per_evaluator=room.gpu_share,
        # The trials' share comes off the evaluators': all together they fill the machine.
        cpus_per_evaluator=cpus - trial_cpus * max_concurrent / num_evaluators,
        most=useful if wanted is None else None,
        cache_folder=(folder / "cache").resolve(),
        cache_key=key_of_run(setup, room.device),
        images=setup.num_images,
        labels=labels,
    )
    trial_setup = replace(setup, shared=None)  # evaluators alone need what candidates share
    try:
        trials = tune_agents(
            task=AgentTask(
                partial(begin_search, trial_setup),
                config.seeds,
                search.evaluations,
                setup.task.metric,
            ),
            broker=broker,
            space={
                key: make_domain(
                    choice=values.choice and [as_text(value) for value in values.choice],
                    uniform=values.uniform,
                    log_uniform=values.log_uniform,
                )
                for key, values in config.space.items()
            },
            start={key: as_text(v) for key, v in read_settings(search, config.space).items()},
            trials=config.trials,
            objective=config.objective,
            algorithm=config.algorithm,
            scheduler=config.scheduler,
            seed=config.seed,
            max_concurrent=max_concurrent,
            trial_cpus=trial_cpus,
            labels=labels,
            files=files,
            on_progress=on_progress,
        )
        return trials, *read_answers(broker)
    finally:
        stop_broker(broker)


def known_share(trial: str, counts: Mapping[str, tuple[int, int]]) -> float | None:
    """Share of a trial's candidates that no evaluator scored for it, since the tuning was started.

    Returns:
        None where the trial asked for none.
    """
    own = [pair for search, pair in counts.items() if search.startswith(f"{trial} ")]
    num_asked = sum(asked for asked, _ in own)
    return sum(known for _, known in own) / num_asked if num_asked else None


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    table = [
        {
            "name": row["name"],
            **row["settings"],
            **{k: row[k] for k in ("evaluations", "is_whole", "score", "area", "known", "since")},
        }
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
