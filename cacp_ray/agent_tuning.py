"""Tuning of the agent: from a YAML file to the settings that search best on the user's network.

The folder holds config.yaml, environment.json, `tune/` (Ray Tune's own), `cache/` (measurements),
and at the end trials.csv, result.json, report.html and best.yaml, which `cacp-ray search` takes.
"""

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.agent_space import (
    AgentTuningConfig,
    Distribution,
    as_text,
    read_settings,
    with_settings,
)
from cacp_ray.clock import Clock
from cacp_ray.config import RunConfig, resolved
from cacp_ray.evaluation.measurement import Evaluator
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.evaluators import find_gpu_share, images_scored, key_of_run, scorer_arguments
from cacp_ray.files import describe_environment, write_file, write_json, write_yaml
from cacp_ray.folders import is_run
from cacp_ray.loading import Base, load_base, prepare_base
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.strategies import check_strategy, make_run_strategy, num_searched


class TrialSearch:
    """One search of a trial, in rounds; its folder holds all after every round."""

    def __init__(self, config: RunConfig, base: Base, evaluator: Evaluator, folder: Path) -> None:
        """Begins the search, or continues what the folder holds."""
        folder.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._loop = SearchLoop(
            evaluator,
            base.plan.cost_model,
            RunDirectory(folder),
            rates=config.rates,
            evaluations=num_searched(config),
            cost=config.cost,
            mode="rounds",
            round_size=config.round_size,
            checkpoint_seconds=math.inf,
        )
        self._strategy, self._agent = make_run_strategy(
            config, base, lambda _: self._loop.tick(self._strategy)
        )
        self._loop.restore(self._strategy)

    @property
    def evaluations(self) -> int:
        """Distinct candidates so far, with those kept for the policy's own answers."""
        done = self._loop.progress.evaluations
        return done + self._config.evaluations - num_searched(self._config)

    @property
    def top1(self) -> float:
        """Mean over rates of the best so far; 0 for a rate that has none."""
        best = self._loop.progress.best.values()
        return float(np.mean([0.0 if each is None else each.top1 for each in best]))

    @property
    def is_done(self) -> bool:
        """Whether nothing is left to do."""
        return self._loop.done

    def advance(self) -> None:
        """One round, and the learning from it."""
        if self._agent is not None and self._agent.is_attached:
            self._agent.train()
        else:
            self._loop.tick(self._strategy)
        self._loop.checkpoint(self._strategy)


def begin_search(
    search: RunConfig,
    base: Base,
    settings: Mapping[str, Any],
    seed: int,
    evaluator: Evaluator,
    folder: Path,
) -> TrialSearch:
    """A search of a trial; `search` has its evaluations."""
    return TrialSearch(with_settings(search, settings, seed=seed), base, evaluator, folder)


def tune_agent(
    config: AgentTuningConfig,
    folder: Path,
    *,
    address: str | None,
    on_progress: Callable[[Any], object],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Runs all trials and writes what came of them; continues what the folder holds.

    Args:
        config: What is tried.
        folder: Empty, or of the same configuration.
        address: Of a Ray cluster; None starts a local Ray unless RAY_ADDRESS is set.
        on_progress: Takes a `cacp_ray.tuning.agents.TrialProgress` for every round of a trial.
        say: Takes a line about each phase.

    Returns:
        The content of result.json.

    Raises:
        CacpError: Bad input, before anything is written, or a trial that failed too often.
    """
    from cacp_ray.distributed.cluster import check_address, check_room, connect
    from cacp_ray.distributed.probe import probe_nodes
    from cacp_ray.tuning.settings import check_algorithm

    clock, is_begun = Clock(), is_run(folder)
    with ExitStack() as stack:
        if is_begun:
            stack.enter_context(RunDirectory(folder).locked())
        with clock.phase("start"):
            check_address(address)
            check_algorithm(config.algorithm)
            search = with_settings(config.search, {}, evaluations=config.evaluations)
            base = load_base(search)
            check_strategy(search, base)
            prepared = prepare_base(base, search)
            connect(address)
            cluster = search.cluster
            check_room(cluster.cpus_per_evaluator, cluster.gpus_per_evaluator, address)
            probe_nodes()
        if not is_begun:
            stack.enter_context(RunDirectory(folder).locked())
        write_yaml(folder / "config.yaml", resolved(config))
        write_json(folder / "environment.json", describe_environment(config.seed))
        with clock.phase("trials"):
            trials, status, counts = _run_trials(
                config, search, base, prepared, folder, on_progress, say
            )
    rows = [
        {**asdict(each), "settings": dict(each.settings), "known": known_share(each.name, counts)}
        for each in trials
    ]
    rows = rank_trials(rows, config.objective)
    best = rows[0]
    result = {
        "name": config.name,
        "objective": config.objective,
        "rates": search.rates,
        "start": {
            key: as_text(value) for key, value in read_settings(search, config.space).items()
        },
        "trials": rows,
        "answers": {name: getattr(status, name) for name in ("scored", "cached", "joined")},
        "seconds": clock.seconds,
    }
    write_yaml(folder / "best.yaml", resolved(with_settings(config.search, best["settings"])))
    write_file(folder / "trials.csv", partial(_write_table, rows))
    write_json(folder / "result.json", result)
    return result


def rank_trials(rows: Sequence[dict[str, Any]], objective: str) -> list[dict[str, Any]]:
    """The best first: trials that came to their end, then those stopped, the latest first."""
    return sorted(
        rows,
        key=lambda row: (
            not row["is_whole"],
            # An end may be early, where nothing new is left to try.
            0 if row["is_whole"] else -row["evaluations"],
            -row[objective],
            # Of those that share what was found, the one whose settings found it.
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
    search: RunConfig,
    base: Base,
    prepared: Any,
    folder: Path,
    on_progress: Callable[[Any], object],
    say: Callable[[str], object],
) -> tuple[list[Any], Any, dict[str, tuple[int, int]]]:
    """Where each trial ended, how the broker answered, and by search what it asked."""
    import ray
    from ray import tune

    from cacp_ray.distributed.broker import start_broker
    from cacp_ray.distributed.room import find_room
    from cacp_ray.tuning.agents import TRIAL_CPUS, TRIALS_SHARE, AgentTask, tune_agents

    cpus = search.cluster.cpus_per_evaluator
    wanted = search.cluster.max_evaluators
    useful = search.evaluations * config.trials * len(config.seeds)
    gpus = find_gpu_share(search, base, prepared, say)
    room = find_room(cpus, gpus, wanted, useful)
    if wanted is not None and room.total > max(1, room.now):
        # Evaluators that wait for room would take what the trials need.
        room = find_room(cpus, gpus, max(1, room.now), useful)
    num_evaluators = room.total
    max_concurrent = trials_at_once(config, num_evaluators)
    trial_cpus = min(TRIAL_CPUS, TRIALS_SHARE * cpus * num_evaluators / max_concurrent)
    say(f"{num_evaluators} evaluators, {max_concurrent} of {config.trials} trials at once")
    broker = start_broker(
        make_scorer,
        scorer_arguments(search, base, prepared, gpus),
        num_evaluators=room.on_cpus,
        num_gpu_evaluators=room.on_gpus,
        gpus_per_evaluator=room.gpu_share,
        # The trials' share comes off the evaluators': all together they fill the machine.
        cpus_per_evaluator=cpus - trial_cpus * max_concurrent / num_evaluators,
        most=useful if wanted is None else None,
        cache_folder=(folder / "cache").resolve(),
        cache_key=key_of_run(search, base, prepared, room.device),
        images=images_scored(search, base),
    )
    try:
        trials = tune_agents(
            task=AgentTask(partial(begin_search, search, base), config.seeds, search.evaluations),
            broker=broker,
            space={key: _as_domain(tune, each) for key, each in config.space.items()},
            start={key: as_text(v) for key, v in read_settings(search, config.space).items()},
            evaluations=search.evaluations,
            trials=config.trials,
            objective=config.objective,
            algorithm=config.algorithm,
            scheduler=config.scheduler,
            seed=config.seed,
            max_concurrent=max_concurrent,
            trial_cpus=trial_cpus,
            experiment_dir=(folder / "tune").resolve(),
            on_progress=on_progress,
        )
        return trials, *ray.get([broker.status.remote(), broker.counts.remote()])
    finally:
        ray.kill(broker)


def _as_domain(tune: Any, distribution: Distribution) -> Any:
    if distribution.choice is not None:
        return tune.choice([as_text(value) for value in distribution.choice])
    if distribution.uniform is not None:
        return tune.uniform(*distribution.uniform)
    assert distribution.log_uniform is not None
    return tune.loguniform(*distribution.log_uniform)


def known_share(trial: str, counts: Mapping[str, tuple[int, int]]) -> float | None:
    """Share of a trial's candidates that no evaluator scored for it, since the tuning was started.

    Args:
        trial: Its name.
        counts: Of the broker, by searches, which `tuning.agents.name_search` has named.

    Returns:
        None where it asked for none.
    """
    own = [pair for search, pair in counts.items() if search.startswith(f"{trial} ")]
    asked = sum(each for each, _ in own)
    return sum(known for _, known in own) / asked if asked else None


def _write_table(rows: list[dict[str, Any]], path: Path) -> None:
    table = [
        {
            "name": row["name"],
            **row["settings"],
            **{k: row[k] for k in ("evaluations", "is_whole", "top1", "area", "known", "since")},
        }
        for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
