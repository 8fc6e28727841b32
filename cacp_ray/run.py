"""A search, from a configuration to a filled run directory."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

from cacp_ray.clock import Clock
from cacp_ray.config import RunConfig, resolved
from cacp_ray.describing import describe_accuracy
from cacp_ray.diagnostics import (
    NUM_IMAGES,
    LearningLog,
    is_moment,
    measure_answers,
    unseen_rates,
)
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.measurement import Evaluator, Measurement, Subnet
from cacp_ray.evaluators import find_gpu_share, start_evaluators
from cacp_ray.files import write_json
from cacp_ray.folders import is_run
from cacp_ray.loading import Base
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.reporting.scalars import ScalarLog
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.search_progress import SearchProgress
from cacp_ray.searching.strategies import RACING
from cacp_ray.starting import Ready, begin_run, prepare_run, write_model
from cacp_ray.storage import RunStorage
from cacp_ray.strategies import make_run_strategy, num_searched
from cacp_ray.winners import (
    Build,
    add_latencies,
    build_here,
    build_winners,
    builder_settings,
    measure_candidates,
    measure_policy,
    measure_uniform,
)


def run_search(
    config: RunConfig,
    run_dir: Path,
    *,
    address: str | None,
    on_progress: Callable[[SearchProgress], object] | None,
    say: Callable[[str], object],
    known: Mapping[Subnet, Measurement] | None = None,
    cache: Path | None = None,
    storage: RunStorage | None = None,
) -> dict[str, Any]:
    """Searches all rates at once and fills `run_dir`, up to result.json.

    Args:
        config: Of the run.
        run_dir: Empty, or this run's own, to go on with what it holds.
        address: Of a Ray cluster; None starts a local Ray unless RAY_ADDRESS is set.
        on_progress: Called while the search goes on.
        say: Takes a line about each phase.
        known: Measurements of other runs, alike in all that a measurement depends on.
        cache: Folder of measurements by content (`cacp_ray.evaluation.cache`), read and added to.
        storage: Where the run is copied to, at every checkpoint.

    Raises:
        CacpError: Bad input, before anything is written, or a failed run.
    """
    clock, run = Clock(), RunDirectory(run_dir)
    is_begun = is_run(run_dir)
    with ExitStack() as lock:
        if is_begun:  # else nothing is written before all has been checked
            lock.enter_context(run.locked())
        ready, statistics = prepare_run(config, run_dir, address, say, clock)
        base, prepared = ready.base, ready.prepared
        with clock.phase("start"):
            gpus = find_gpu_share(config, base, prepared, say, ready.stored)
            evaluator, kept = start_evaluators(
                config,
                base,
                prepared,
                cache,
                say,
                num_measured=len({record.subnet for record in run.read_records()}),
                stored=ready.stored,
                gpus=gpus,
            )
            if cache is not None:
                known = kept | dict(known or {})
                say(f"{len(kept):,} measurements are known from {cache}")
        with closing(evaluator):
            if not is_begun:
                lock.enter_context(run.locked())
                if is_run(run_dir):
                    raise ArtifactError(
                        f"{run_dir}: another process has begun a run there meanwhile: pass "
                        "--resume to continue it, or choose another --run-dir"
                    )
            with clock.phase("start"):
                if ready.saved is None:
                    begin_run(run, config, base, statistics)
                del statistics  # the base network is measured without them in memory
                saved = ready.saved or write_model(run, config, ready)
                say(describe_accuracy(saved))
            with clock.phase("search"):
                loop, agent, log = _search(
                    config, base, run, evaluator, on_progress, known, storage
                )
            clock.seconds["search"] = round(loop.seconds, 2)
            with clock.phase("frontier"):
                answers = measure_policy(agent.policy, base, config, evaluator) if agent else []
                reference = measure_uniform(base, config, evaluator)
                if agent:
                    agent.stop()
                learning = _measure_learning(config, base, log, evaluator) if log else None
        with clock.phase("build"):
            searched = {rate: loop.archive.best(rate) for rate in config.rates}
            build = _find_build(config, ready, gpus)
            rows = build_winners(
                config, base, prepared, searched, run_dir, build, answers, reference
            )
        result = {
            **_describe(config, base),
            "base": saved["base"],
            "rates": rows,
            "frontier": [
                {key: value for key, value in answer.items() if key != "record"}
                for answer in answers
            ],
            "learning": learning,
            "evaluations": loop.progress.evaluations + _count_new(answers, config, run),
            "seconds": clock.seconds,
        }
        add_latencies(result, base, run_dir)
        write_json(run_dir / "result.json", result)
        if storage is not None:
            storage.finish(run_dir)
        return result


def _describe(config: RunConfig, base: Base) -> dict[str, Any]:
    """What was searched, for result.json."""
    return {
        "name": config.name,
        "strategy": config.strategy,
        "cost": describe_cost(config.cost),
        "groups": [
            {"name": g.name, "num_channels": g.num_channels, "is_residual": g.is_residual}
            for g in base.plan.groups
        ],
    }


def _count_new(answers: Sequence[dict[str, Any]], config: RunConfig, run: RunDirectory) -> int:
    """Of the policy's answers at the searched rates, those that the search had not measured."""
    own = {answer["record"].subnet for answer in answers if answer["rate"] in config.rates}
    return len(own - {record.subnet for record in run.read_records()})


def _find_build(config: RunConfig, ready: Ready, gpus: float) -> Build:
    """Final subnets are built where evaluators ran, unless this machine is all there is."""
    from cacp_ray.distributed.building import build_on_nodes, is_alone

    if is_alone() and not gpus:
        return build_here(config, ready.prepared, ready.base.search)
    return partial(
        build_on_nodes,
        **ready.stored,
        settings=builder_settings(config),
        cpus=config.cluster.cpus_per_evaluator,
        gpus=gpus,
    )


def _search(
    config: RunConfig,
    base: Base,
    run: RunDirectory,
    evaluator: Evaluator,
    on_progress: Callable[[SearchProgress], object] | None,
    known: Mapping[Subnet, Measurement] | None,
    storage: RunStorage | None,
) -> tuple[SearchLoop, Any, LearningLog | None]:
    """The finished loop, the agent and its log; None where there is no policy, or no agent."""
    cost_model = base.plan.cost_model
    loop = SearchLoop(
        evaluator,
        cost_model,
        run,
        rates=config.rates,
        evaluations=num_searched(config),
        cost=config.cost,
        mode=config.mode,
        round_size=config.round_size,
        known=known,
        races=config.evaluation.racing and config.strategy in RACING,
        on_progress=on_progress,
        on_checkpoint=None if storage is None else partial(storage.push, run.path),
    )
    strategy, agent = make_run_strategy(config, base, lambda _: loop.tick(strategy), run.path)
    loop.restore(strategy)
    log, scalars = None, ScalarLog(config.logging, run.path, config.name, resolved(config))
    if agent is not None:
        unseen = unseen_rates(config.rates, base.budget)
        log = LearningLog(run, agent, config.rates, unseen, num_searched(config), scalars)
    shown = loop.progress.evaluations
    while not loop.done:
        turn: dict[str, Any] = {}
        if agent is not None and agent.is_attached:
            turn = agent.train()
        else:
            loop.tick(strategy)
        if log is not None:
            log.watch(loop.progress.evaluations, turn, is_last=loop.done)
        shown = _show_best(scalars, loop, shown)
    scalars.close()
    loop.checkpoint(strategy)
    return loop, agent if agent is not None and agent.is_attached else None, log


def _show_best(scalars: ScalarLog, loop: SearchLoop, shown: int) -> int:
    """Logs the best of every rate at about forty moments; returns the evaluations of the last."""
    progress = loop.progress
    if not (loop.done or is_moment(shown, progress.evaluations, progress.total)):
        return shown
    scalars.write(
        {
            f"best_top1/{rate:.2f}": None if best is None else best.top1
            for rate, best in progress.best.items()
        }
        | {"evaluations_per_second": progress.evaluations_per_second},
        progress.evaluations,
    )
    return progress.evaluations


def _measure_learning(
    config: RunConfig, base: Base, log: LearningLog, evaluator: Evaluator
) -> dict[str, Any]:
    """What result.json says of the agent's learning, beside the lines of learning.jsonl."""
    images = min(config.evaluation.images or len(base.search), len(base.search))
    points = measure_answers(
        log.lines, config.rates, min(NUM_IMAGES, images), partial(measure_candidates, evaluator)
    )
    log.close(points)
    return {"images": images, "policy_top1": points}
