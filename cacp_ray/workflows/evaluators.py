"""The evaluators of a run: actors on a connected cluster, and the cache in front of them."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacp_ray.config.run import ClusterConfig, RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.cache import (
    CachedEvaluator,
    MeasurementCache,
    key_of_own_scores,
    key_of_scores,
)
from cacp_ray.evaluation.gpu import Need
from cacp_ray.evaluation.measurement import Evaluator
from cacp_ray.evaluation.scorer import measure_task_need, read_dtype
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.evaluation.task_scorer import make_scorer
from cacp_ray.io.environment import with_same_versions
from cacp_ray.workflows.setup import Setup

if TYPE_CHECKING:
    from cacp_ray.distributed.nodes import Room

logger = logging.getLogger(__name__)


def join(config: RunConfig, address: str | None) -> None:
    """Joins a cluster or starts a local Ray, and asks whether it could serve.

    Raises:
        ConfigError: The cluster does not answer, or an evaluator could never run there.
    """
    from cacp_ray.distributed.cluster import check_room, connect
    from cacp_ray.distributed.nodes import check_labels
    from cacp_ray.distributed.probe import probe_nodes

    connect(address, runtime_env=config.cluster.runtime_env)
    check_room(config.cluster.cpus_per_evaluator, config.cluster.gpus_per_evaluator, address)
    check_labels(config.cluster.label_selector, address, "cluster.label_selector")
    probe_nodes()


def read_cpus(config: RunConfig, address: str | None) -> list[float]:
    """CPUs of each node that a search would find, without a Ray where it would start one.

    Raises:
        ConfigError: The cluster does not answer, or an evaluator could never run there.
    """
    from cacp_ray.distributed.cluster import check_room, is_local
    from cacp_ray.distributed.internals import count_cpus
    from cacp_ray.distributed.nodes import read_nodes

    if is_local(address):
        check_room(config.cluster.cpus_per_evaluator, config.cluster.gpus_per_evaluator, address)
        return [count_cpus()]
    join(config, address)
    return list(read_nodes(config.cluster.label_selector).cpus.values())


def find_gpu_share(setup: Setup) -> float:
    """Share of a GPU for each evaluator: as configured, or for `auto` as the GPUs' memory allows.

    Raises:
        ConfigError: A GPU is there but none is free to measure memory on.
    """
    from cacp_ray.distributed.gpus import measure_on_gpus
    from cacp_ray.distributed.nodes import find_share, read_nodes

    cluster = setup.config.cluster
    share, cpus = cluster.gpus_per_evaluator, cluster.cpus_per_evaluator
    if share != "auto":
        return share
    if isinstance(setup.task, OwnTask):
        raise ConfigError(
            "cluster.gpus_per_evaluator: auto measures the memory of image classification; give a "
            "share of a GPU for a task of your own"
        )
    needs = measure_on_gpus(
        with_same_versions(measure_task_need),
        scorer_arguments(setup, 1.0),
        cpus,
        cluster.label_selector,
    )
    nodes = read_nodes(cluster.label_selector)
    if not needs and any(nodes.gpus.values()):
        raise ConfigError(
            f"no GPU was free to measure memory on, with {cpus} free CPUs on its node: wait for "
            "one, or set cluster.gpus_per_evaluator to a number, 0 for CPUs"
        )
    share = find_share(needs, nodes, cpus)
    logger.info(describe_needs(list(needs.values()), share))
    return share


def describe_needs(needs: Sequence[Need], share: float) -> str:
    """One line: what was measured on one GPU of each node, and the share that follows."""
    if not share:
        return "GPUs: none is there now, so evaluators score on CPUs"
    taken, gpu = max(need.evaluator for need in needs), min(need.gpu for need in needs)
    return (
        f"GPUs: an evaluator takes about {taken / 2**30:.1f} of {gpu / 2**30:.0f} GB, "
        f"{round(1 / share)} score on each"
    )


def start_evaluators(
    setup: Setup, *, gpus: float = 0.0, num_measured: int = 0, cache: Path | None = None
) -> Evaluator:
    """Starts the actors in the background; with a cache, it answers what was scored alike."""
    from cacp_ray.distributed.actors import RayActors
    from cacp_ray.distributed.nodes import find_room, read_free, read_nodes
    from cacp_ray.distributed.pool import RayEvaluatorPool

    config, cluster = setup.config, setup.config.cluster
    # Never more than could work at once, since nodes may be started for them.
    left = max(config.evaluations - num_measured, len(config.rates))
    useful = config.round_size if config.mode == "rounds" else left
    room = find_room(
        read_nodes(cluster.label_selector),
        read_free(),
        cluster.cpus_per_evaluator,
        gpus,
        cluster.max_evaluators,
        useful,
    )
    logger.info(describe_evaluators(cluster, room))
    pool = RayEvaluatorPool(
        RayActors(
            with_same_versions(make_scorer),
            scorer_arguments(setup, gpus),
            cluster.label_selector,
        ),
        num_evaluators=room.on_cpus,
        cpus_per_evaluator=cluster.cpus_per_evaluator,
        num_gpu_evaluators=room.on_gpus,
        gpus_per_evaluator=room.gpu_share,
        most=useful if cluster.max_evaluators is None else None,
    )
    if cache is None:
        return pool
    known = MeasurementCache(cache, key_of_run(setup, room.device))
    logger.info("%s measurements are known from %s", f"{len(known):,}", cache)
    return CachedEvaluator(pool, known, setup.num_images)


def describe_evaluators(cluster: ClusterConfig, room: "Room") -> str:
    """One line: how many evaluators are asked for, what each reserves, how many can begin."""
    kinds = [
        (room.on_gpus, f"{cluster.cpus_per_evaluator} CPU and {room.gpu_share:g} GPU"),
        (room.on_cpus, f"{cluster.cpus_per_evaluator} CPU"),
    ]
    asked = ", ".join(f"{number:,} with {what} each" for number, what in kinds if number)
    return f"evaluators: {asked}, room for {room.now:,} now"


def scorer_arguments(setup: Setup, gpus: float = 0.0) -> dict[str, Any]:
    """What an evaluator with a share of a GPU, or none, builds its score function from."""
    config = setup.config
    dtype = config.evaluation.dtype
    if not gpus:
        # As this machine has it: nodes with other processors would compute in another one.
        dtype = str(read_dtype(dtype)).removeprefix("torch.")
    return {
        "prepared": setup.prepared,
        "task": setup.task,
        **setup.stored,
        "recovery": config.pruning.recovery,
        "batch_size": config.evaluation.batch_size,
        "dtype": dtype,
        "images": config.evaluation.images,
        "threads": config.cluster.cpus_per_evaluator,
    }


def key_of_run(setup: Setup, device: str) -> str:
    """Content key of the measurements on a device: `key_of_scores` or `key_of_own_scores`.

    Raises:
        ConfigError: The source of a task of the user's own cannot be read.
    """
    dtype, recovery = setup.config.evaluation.dtype, setup.config.pruning.recovery
    if isinstance(setup.task, OwnTask):
        return key_of_own_scores(
            setup.prepared, setup.task, setup.inputs, recovery=recovery, device=device
        )
    return key_of_scores(
        setup.prepared,
        setup.search,
        recovery=recovery,
        # The driver may have no GPU to ask.
        dtype=str(read_dtype(dtype)) if device == "cpu" else f"{device} {dtype}",
    )
