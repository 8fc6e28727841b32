"""A search, from a configuration to a filled run directory.

`search` reads from top to bottom: check and prepare, start evaluators, search, ask the policy,
build and save the winner of every rate. Nothing is written before all input has been checked.
"""

import logging
from collections.abc import Callable, Iterable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cacp_ray.config.reading import resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import is_run, open_folder
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.cache import check_folder
from cacp_ray.evaluation.measurement import Evaluator
from cacp_ray.evaluation.task import SCORE, FunctionTask, OwnTask
from cacp_ray.io.clock import Clock
from cacp_ray.pruning.calibration import Loss
from cacp_ray.reporting.progress import SearchProgress
from cacp_ray.reporting.scalars import ScalarLog
from cacp_ray.rundir.directory import RunDirectory, read_result
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategies import RACING, WIDTH_STRATEGIES
from cacp_ray.searching.strategy import Strategy, make_candidates
from cacp_ray.workflows.evaluators import (
    find_gpu_share,
    start_evaluators,
)
from cacp_ray.workflows.learning_log import (
    LearningLog,
    log_best,
    measure_learning,
    unseen_rates,
)
from cacp_ray.workflows.problem import Given, configure
from cacp_ray.workflows.result import finish_run
from cacp_ray.workflows.run import Run
from cacp_ray.workflows.setup import Setup, describe_accuracy
from cacp_ray.workflows.start import begin_run, prepare_run, write_model
from cacp_ray.workflows.storage import open_for_search
from cacp_ray.workflows.strategy import (
    CONDITIONAL,
    Policy,
    find_policy,
    make_run_strategy,
    num_reserved,
)
from cacp_ray.workflows.widths import learn_run
from cacp_ray.workflows.winners import (
    build_winners,
    choose_build,
    drop_failed,
    frontier_rates,
    measure_outside,
    measure_uniform,
)

logger = logging.getLogger(__name__)

OnProgress = Callable[[SearchProgress], object]


def search(
    config: RunConfig | dict[str, Any] | str | Path | None = None,
    run_dir: str | Path | None = None,
    *,
    model: nn.Module | None = None,
    task: Any = None,
    example_inputs: Any = None,
    calibration: Callable[[], Iterable[Any]] | str | None = None,
    score: Callable[[nn.Module], Any] | str | None = None,
    loss: Loss | str | None = None,
    metric: str = SCORE,
    resume: bool = False,
    address: str | None = None,
    on_progress: OnProgress | None = None,
    cache: str | Path | None = None,
    storage: str | Path | None = None,
    **settings: Any,
) -> Run:
    """Searches a smaller network for every rate at once.

    A network of your own is given as `model`, and what it is for as a `task`
    (`cacp_ray.evaluation.task.Task`) or as functions: `example_inputs`, `calibration` and `score`.
    A function may be a closure or a `package.module:function`.

    Args:
        config: A configuration, its content, or the path of its YAML file; None for the defaults.
        run_dir: Default: runs/NAME.
        model: The trained network, in place of the one that the configuration names. Its weights
            stay in memory: give it again to continue the run.
        task: An object with `example_inputs`, `calibration()` and `score(net)`.
        example_inputs: What the network is called with: a tensor, a tuple or a dictionary of them.
        calibration: Called without arguments, it gives batches of training data: tensors, tuples
            with the inputs first, or dictionaries.
        score: (network) -> a number, or a mapping of numbers with `score`; higher is better, on any
            scale. Evaluators call it on their device, after the repair.
        loss: (network, batch) -> mean loss of a batch, for criteria that read gradients.
        metric: Name of the score in tables and figures.
        resume: Whether to go on with what `run_dir` holds.
        address: Address of a Ray cluster; None takes RAY_ADDRESS, else starts a local Ray.
        on_progress: Called while the search goes on.
        cache: Folder where measurements are kept for other runs: what is scored alike, whatever
            the run, is scored once, and counts as an evaluation in each.
        storage: Folder, s3:// or gs:// URI that the run is copied to at every checkpoint. With
            `resume`, what it holds is fetched and gone on with; the search begins where it holds
            nothing yet, so that one call serves the first start and every other.
        **settings: Keys of the configuration, such as `rates=[0.3, 0.5]`.

    Raises:
        CacpError: Bad input, before anything is written, or a failed run.
    """
    functions = {"calibration": calibration, "score": score, "loss": loss}
    parts = functions | {"example_inputs": example_inputs}
    if task is not None:
        given_too = [name for name, part in parts.items() if part is not None]
        given_too += ["metric"] if metric != SCORE else []
        if given_too:
            raise ConfigError(
                f"search(task=..., {given_too[0]}=...): a task brings its own {given_too[0]}; give "
                "the task or its parts, not both"
            )
    for name, part in functions.items():
        if part is not None and not callable(part) and not isinstance(part, str):
            raise ConfigError(
                f"{name} is of type {type(part).__name__}, not a function: "
                + ("write lambda: loader" if name == "calibration" else "see docs/tasks.md")
            )
    if task is None and score is not None:
        if calibration is None or example_inputs is None:
            raise ConfigError("search(score=...) needs calibration=... and example_inputs=... too")
        task = FunctionTask(example_inputs, calibration, score, loss, metric)
    elif score is None and any(part is not None for part in parts.values()):
        raise ConfigError("search(calibration=..., example_inputs=...) needs score=... too")
    chosen, given = configure(config, settings, model, task)
    return _search_in(chosen, given, run_dir, resume, address, on_progress, cache, storage)


def _search_in(
    settings: RunConfig,
    given: Given | None,
    run_dir: str | Path | None,
    resume: bool,
    address: str | None,
    on_progress: OnProgress | None,
    cache: str | Path | None,
    storage: str | Path | None,
) -> Run:
    folder = Path(run_dir) if run_dir is not None else Path("runs") / settings.name
    mirror = None if storage is None else open_for_search(str(storage), folder, settings, resume)
    is_first = mirror is not None and mirror.config is None and not is_run(folder)
    open_folder(folder, settings, resume=resume and not is_first)
    if (folder / "result.json").exists():
        if mirror is not None:
            mirror.finish(folder)
        return Run(folder, read_result(folder), mirror, given)  # fine-tuning may have added to it
    if cache is not None and settings.task is not None:
        raise ConfigError("a cache knows measurements of images alone: leave it out for a task")
    if cache is not None:
        check_folder(Path(cache))
    if settings.strategy in WIDTH_STRATEGIES:
        result = learn_run(settings, folder, given, address=address, mirror=mirror)
    else:
        result = _run_search(
            settings,
            folder,
            given,
            address=address,
            on_progress=on_progress,
            cache=None if cache is None else Path(cache),
            mirror=mirror,
        )
    return Run(folder, result, mirror, given)


def _run_search(
    config: RunConfig,
    run_dir: Path,
    given: Given | None,
    *,
    address: str | None,
    on_progress: OnProgress | None,
    cache: Path | None,
    mirror: RunMirror | None,
) -> dict[str, Any]:
    """Fills `run_dir` up to result.json, whose content it returns."""
    clock, run = Clock(), RunDirectory(run_dir)
    is_begun = is_run(run_dir)
    with ExitStack() as lock:
        if is_begun:
            lock.enter_context(run.locked())
        setup, statistics = prepare_run(config, run_dir, address, clock, given)
        with clock.phase("start"):
            gpus = find_gpu_share(setup)
            num_measured = len({record.key for record in run.read_records()})
            evaluator = start_evaluators(setup, gpus=gpus, num_measured=num_measured, cache=cache)
        with closing(evaluator):
            if not is_begun:
                lock.enter_context(run.locked())
                if is_run(run_dir):
                    raise ArtifactError(
                        f"{run_dir}: another process has begun a run there: pass --resume (in "
                        "Python resume=True) to continue it, or choose another --run-dir"
                    )
            with clock.phase("start"):
                if setup.saved is None:
                    begin_run(run, setup, statistics)
                del statistics  # the base network is measured without them in memory
                saved = setup.saved or write_model(run, setup)
                logger.info(describe_accuracy(saved))
            with clock.phase("search"):
                strategy = make_run_strategy(setup)
                loop = _make_loop(setup, run, evaluator, on_progress, mirror)
                log = _search(setup, run_dir, loop, strategy)
            clock.seconds["search"] = round(loop.seconds, 2)
            searched = {rate: loop.archive.best(rate) for rate in config.rates}
            with clock.phase("frontier"):
                policy = find_policy(strategy) if num_reserved(config) else None
                answers = _ask_policy(setup, policy, loop, evaluator) if policy else []
                reference = measure_uniform(setup, evaluator)
                learning = None
                is_own = isinstance(setup.task, OwnTask)  # whose scores may be costly
                if log is not None and config.report.learning and not is_own:
                    learning = measure_learning(log, setup, evaluator)
                if policy:
                    policy.stop()
        with clock.phase("build"):
            build = choose_build(setup, gpus)
            rows = build_winners(setup, searched, run_dir, build, answers, reference)
        return finish_run(
            setup,
            run_dir,
            saved["base"],
            rows,
            evaluations=loop.progress.evaluations,
            seconds=clock.seconds,
            mirror=mirror,
            answers=answers,
            learning=learning,
        )


def _make_loop(
    setup: Setup,
    run: RunDirectory,
    evaluator: Evaluator,
    on_progress: OnProgress | None,
    mirror: RunMirror | None,
) -> SearchLoop:
    config = setup.config
    return SearchLoop(
        evaluator,
        setup.plan.cost_model,
        run,
        rates=config.rates,
        evaluations=config.evaluations,
        reserved=num_reserved(config),
        cost=config.cost,
        mode=config.mode,
        round_size=config.round_size,
        races=config.evaluation.racing and config.strategy in RACING,
        on_progress=None
        if on_progress is None
        else lambda progress: on_progress(replace(progress, metric=setup.task.metric)),
        on_checkpoint=None if mirror is None else partial(mirror.push, run.path),
    )


def _search(
    setup: Setup, run_dir: Path, loop: SearchLoop, strategy: Strategy
) -> LearningLog | None:
    """Runs the loop to the end of the search; returns the log of a conditional agent."""
    config = setup.config
    loop.restore(strategy)
    scalars = ScalarLog(config.logging, run_dir, config.name, resolved(config))
    log = None
    if config.strategy in CONDITIONAL:
        unseen = unseen_rates(config.rates, setup.budget)
        log = LearningLog(run_dir, strategy, config.rates, unseen, config.evaluations, scalars)
    shown = loop.progress.evaluations
    while not loop.done:
        figures = loop.tick(strategy)
        if log is not None:
            log.watch(loop.progress.evaluations, loop.records, figures, is_last=loop.done)
        shown = log_best(scalars, loop, shown)
    scalars.close()
    loop.checkpoint(strategy)
    return log


def _ask_policy(
    setup: Setup, policy: Policy, loop: SearchLoop, evaluator: Evaluator
) -> list[EpisodeRecord]:
    """What the policy answers at the run's rates, its last evaluations, and at those of a frontier.

    Returns:
        The records of the answers that could be measured, by rising rate.
    """
    rates = setup.config.rates
    others = frontier_rates(setup) if setup.config.report.frontier else []
    number = len(rates) + len(others)
    logger.info(
        "the policy answers: %d %s, of which the last evaluations are %d",
        number,
        "rate" if number == 1 else "rates",
        len(rates),
    )
    counts = policy.policy([*rates, *others])
    asked = make_candidates(rates, counts[: len(rates)])
    own = loop.measure_last([replace(each, images=len(setup.task)) for each in asked])
    beyond = measure_outside(setup, others, counts[len(rates) :], evaluator)
    return sorted([*drop_failed(own), *beyond], key=lambda answer: answer.rate)
