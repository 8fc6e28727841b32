"""A search's input checked and its cost told, without a search."""

import copy
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import open_folder
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.searching.strategies import WIDTH_STRATEGIES
from cacp_ray.searching.widths.table import FOR_ALL_RATES
from cacp_ray.workflows.estimate import (
    GpuFigures,
    describe_estimate,
    estimate_on_gpus,
    estimate_search,
    gpu_arguments,
    measure_gpu,
)
from cacp_ray.workflows.evaluators import describe_needs, read_cpus
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits
from cacp_ray.workflows.start import check_run

if TYPE_CHECKING:
    from cacp_ray.distributed.nodes import Nodes


def check_search(
    config: RunConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    address: str | None = None,
    price: float | None = None,
) -> str:
    """Does all that a search does before it writes anything, but for starting a local Ray.

    Returns:
        Lines about what it would search, and what that would take.

    Raises:
        CacpError: The first thing that does not fit.
    """
    open_folder(run_dir, config, resume=resume)
    cpus = read_cpus(config, address)
    setup = Setup.create(config, run_dir)
    check_run(setup)
    if config.strategy in WIDTH_STRATEGIES:
        lines = [_describe_widths(config)]
    elif isinstance(setup.task, OwnTask):
        lines = [_time_own(setup, setup.task)]
    else:
        lines = estimate(setup, cpus, address, price)
    return "\n".join([setup.describe(), *lines])


def _describe_widths(config: RunConfig) -> str:
    """The trainings of a strategy that learns widths; their time is not estimated."""
    steps = config.widths.epochs * -(
        -Splits(config.data).count("train") // config.finetune.batch_size
    )
    number = 1 if config.strategy in FOR_ALL_RATES else len(config.rates)
    return (
        f"{number} {'training' if number == 1 else 'trainings'} of the whole network for "
        f"{config.widths.epochs} epochs, {steps:,} steps each; no candidates are measured, and the "
        "time is not estimated"
    )


def _time_own(setup: Setup, task: OwnTask) -> str:
    """What one score of a task of the user's own takes here."""
    started = time.perf_counter()
    task.measure(copy.deepcopy(setup.model))
    seconds = time.perf_counter() - started
    return (
        f"{setup.config.evaluations:,} evaluations; to score the whole network took "
        f"{seconds:.2f} s here, smaller networks take less"
    )


def estimate(
    setup: Setup, cpus: list[float], address: str | None, price: float | None
) -> list[str]:
    """Lines about what a search would take on nodes of so many CPUs (`read_cpus`).

    Raises:
        CacpError: A GPU cannot be used.
    """
    from cacp_ray.distributed.cluster import is_local

    share, can_grow = setup.config.cluster.gpus_per_evaluator, not is_local(address)
    if share:
        figures, nodes = _find_gpus(setup, address)
        if figures:
            on_gpus = estimate_on_gpus(setup, figures, nodes, can_grow=can_grow)
            return describe_estimate(on_gpus, price)
        if share != "auto" or any(nodes.gpus.values()):
            return [
                f"{setup.config.evaluations:,} evaluations; no GPU of the cluster is free now "
                "(cluster.gpus_per_evaluator), so neither time nor price nor room is estimated"
            ]
    lines = describe_estimate(estimate_search(setup, cpus, can_grow=can_grow), price)
    return [describe_needs([], 0.0), *lines] if share else lines


def _find_gpus(setup: Setup, address: str | None) -> tuple[dict[str, GpuFigures], "Nodes"]:
    """What is measured on a GPU of each node that has one, and the nodes.

    Raises:
        CacpError: A GPU cannot be used.
    """
    from cacp_ray.distributed.cluster import is_local
    from cacp_ray.distributed.gpus import measure_on_gpus
    from cacp_ray.distributed.internals import count_cpus
    from cacp_ray.distributed.nodes import Nodes, read_nodes

    if not is_local(address):
        cluster = setup.config.cluster
        cpus, labels = cluster.cpus_per_evaluator, cluster.label_selector
        figures = measure_on_gpus(measure_gpu, gpu_arguments(setup), cpus, labels)
        return figures, read_nodes(labels)
    gpus = torch.cuda.device_count()
    figures = {"": measure_gpu(**gpu_arguments(setup))} if gpus else {}
    return figures, Nodes({"": count_cpus()}, {"": gpus}, frozenset())
