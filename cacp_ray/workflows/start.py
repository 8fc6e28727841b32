"""What a search does before its first candidate: check, prepare, join the cluster, begin."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacp_ray.config.reading import resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.io.clock import Clock
from cacp_ray.io.environment import describe_environment, give_back_memory
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.reporting.scalars import check_loggers
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.strategies import WIDTH_STRATEGIES
from cacp_ray.workflows.evaluators import join, read_cpus
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import check_strategy
from cacp_ray.workflows.width_problem import check_widths

logger = logging.getLogger(__name__)


def check_run(setup: Setup) -> None:
    """Refuses what cannot be run, before anything is written.

    Raises:
        ConfigError: The strategy cannot be made, or a logger is not installed.
    """
    if setup.config.strategy in WIDTH_STRATEGIES:
        check_widths(setup)
    check_strategy(setup)
    check_loggers(setup.config.logging)


def prepare_run(
    config: RunConfig, run_dir: Path, address: str | None, clock: Clock, given: Given | None = None
) -> tuple[Setup, Statistics]:
    """Reads and prepares everything, and joins the cluster; writes nothing.

    Returns:
        The problem, whose large arrays lie in Ray's store, and the statistics, which a run that
        begins has to save.

    Raises:
        CacpError: Bad input, or a cluster that cannot score.
    """
    from cacp_ray.distributed.cluster import check_address, is_local
    from cacp_ray.distributed.tasks import check_sendable, share

    with clock.phase("prepare"):
        check_address(address)
        read_cpus(config, address)  # before the images: those of a large data set take minutes
        setup = Setup.create(config, run_dir, given)
        check_run(setup)
        give_back_memory()
    logger.info(setup.describe())
    with clock.phase("start"), ThreadPoolExecutor(1) as executor:
        # Without the search split, whose copy would stay in this process as long as it takes.
        few = replace(setup, task=setup.task.without_data())
        preparing = executor.submit(_prepare, few)
        if is_local(address):  # at the same time, as it takes seconds
            join(config, address)
        if given is not None:
            check_sendable(given.parts)
        stored_task, task = share(setup.task)
        setup = replace(setup, task=task)  # this process's own copy of the images is freed
        shared, statistics = preparing.result()
        prepared, shared = share(shared)
        del preparing, few  # they hold what is in the store now
        give_back_memory()
    stored = {"task": stored_task, "prepared": prepared}
    return replace(setup, shared=shared, stored=stored), statistics


def _prepare(setup: Setup) -> tuple[Prepared, Statistics]:
    statistics = setup.find_statistics()
    return setup.prepare(statistics).prepared, statistics


def begin_run(run: RunDirectory, setup: Setup, statistics: Statistics) -> None:
    """Writes what a run starts with, but for model.json."""
    run.write_config(resolved(setup.config))
    setup.save_statistics(run.path, statistics)
    run.write_environment(describe_environment(setup.config.seed))


def write_model(run: RunDirectory, setup: Setup) -> dict[str, Any]:
    """Measures the base network; writes model.json and returns its content."""
    give_back_memory()
    model = setup.describe_model()
    run.write_model(model)
    give_back_memory()
    return model
