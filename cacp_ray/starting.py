"""What a search needs before its first candidate: a cluster, the network, what candidates share."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cacp_ray.clock import Clock
from cacp_ray.config import RunConfig, resolved
from cacp_ray.describing import describe_base, describe_model
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.evaluators import describe_needs
from cacp_ray.files import describe_environment, read_object
from cacp_ray.loading import (
    STATISTICS_FILE,
    Base,
    check_weights,
    find_statistics,
    key_of_statistics,
    load_base,
    prepare_base,
    read_orders,
)
from cacp_ray.memory import give_back_memory
from cacp_ray.planning import (
    GpuFigures,
    describe_estimate,
    estimate_on_gpus,
    estimate_search,
    gpu_arguments,
    measure_gpu,
)
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.statistics_file import save_statistics
from cacp_ray.reporting.scalars import check_loggers
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.strategies import check_strategy

if TYPE_CHECKING:
    from cacp_ray.distributed.nodes import Nodes


def join(config: RunConfig, address: str | None) -> None:
    """Joins a cluster or starts a local Ray, and asks whether it could serve.

    Raises:
        ConfigError: The cluster does not answer, or an evaluator could never run there.
    """
    from cacp_ray.distributed.cluster import check_room, connect
    from cacp_ray.distributed.probe import probe_nodes

    connect(address)
    check_room(config.cluster.cpus_per_evaluator, config.cluster.gpus_per_evaluator, address)
    probe_nodes()


def is_local(address: str | None) -> bool:
    """Whether a search with this `--address` would start a Ray of its own."""
    return (address or os.environ.get("RAY_ADDRESS") or "local") == "local"


def find_room(config: RunConfig, address: str | None) -> list[float]:
    """CPUs of each node that a search would find, without a Ray where it would start one.

    Raises:
        ConfigError: As of `join`.
    """
    from cacp_ray.distributed.cluster import check_room, count_cpus
    from cacp_ray.distributed.nodes import read_nodes

    if is_local(address):
        check_room(config.cluster.cpus_per_evaluator, config.cluster.gpus_per_evaluator, address)
        return [count_cpus()]
    join(config, address)
    return list(read_nodes().cpus.values())


def estimate(
    config: RunConfig, base: Base, cpus: list[float], address: str | None, price: float | None
) -> list[str]:
    """Lines of what a search would take; after `find_room`, whose answer `cpus` is.

    Raises:
        CacpError: A GPU that cannot be used.
    """
    share, can_grow = config.cluster.gpus_per_evaluator, not is_local(address)
    if share:
        figures, nodes = _find_gpus(config, base, address)
        if figures:
            found = estimate_on_gpus(config, base, figures, nodes, can_grow=can_grow)
            return describe_estimate(found, price)
        if share != "auto" or any(nodes.gpus.values()):
            return [
                f"{config.evaluations:,} evaluations; no GPU of the cluster is free now "
                "(cluster.gpus_per_evaluator), so neither time nor price nor room is estimated"
            ]
    found = estimate_search(config, base, cpus, can_grow=can_grow)
    none = [describe_needs([], 0.0)] if share else []
    return [*none, *describe_estimate(found, price)]


def _find_gpus(
    config: RunConfig, base: Base, address: str | None
) -> tuple[dict[str, GpuFigures], "Nodes"]:
    """What is measured on a GPU of each node that has one, and the nodes.

    Raises:
        CacpError: A GPU that cannot be used.
    """
    import torch

    from cacp_ray.distributed.cluster import count_cpus
    from cacp_ray.distributed.gpus import measure_on_gpus
    from cacp_ray.distributed.nodes import Nodes, read_nodes

    if not is_local(address):
        cpus = config.cluster.cpus_per_evaluator
        return measure_on_gpus(measure_gpu, gpu_arguments(config, base), cpus), read_nodes()
    gpus = torch.cuda.device_count()
    figures = {"": measure_gpu(**gpu_arguments(config, base))} if gpus else {}
    return figures, Nodes({"": count_cpus()}, {"": gpus}, frozenset())


@dataclasses.dataclass(frozen=True)
class Ready:
    """A run whose candidates could be scored.

    Attributes:
        base: Network and images; the search split's arrays lie in Ray's store.
        prepared: What candidates share, likewise.
        stored: Ray's references of `split` and `prepared`.
        saved: The content of model.json; None of a run that has not begun.
    """

    base: Base
    prepared: Prepared
    stored: Mapping[str, Any]
    saved: dict[str, Any] | None


def prepare_run(
    config: RunConfig,
    run_dir: Path,
    address: str | None,
    say: Callable[[str], object],
    clock: Clock,
) -> tuple[Ready, Statistics]:
    """Reads and prepares all, and joins the cluster; writes nothing.

    Returns:
        What the run needs, and the statistics, which it needs no more once they are written.

    Raises:
        CacpError: Bad input, or a cluster that cannot score.
    """
    from cacp_ray.distributed.cluster import check_address
    from cacp_ray.distributed.sharing import share

    with clock.phase("prepare"):
        check_address(address)
        find_room(config, address)  # images of a large data set take minutes
        base = load_base(config)
        check_run(config, base)
        give_back_memory()
    saved = _read_model(base, run_dir)
    say(describe_base(base, config))
    with clock.phase("start"), ThreadPoolExecutor(1) as executor:
        orders = None if saved is None else read_orders(saved)
        # Without the images, which would stay in this process as long as it takes.
        few = dataclasses.replace(base, search=base.search.at(np.arange(1)))
        preparing = executor.submit(_prepare, few, config, orders, run_dir)
        if is_local(address):  # beside, as it takes seconds
            join(config, address)
        split, images = share(base.search)
        base = dataclasses.replace(base, search=images)
        stored, prepared, statistics = _share_prepared(preparing)
        del preparing  # which holds what is in the store now
        give_back_memory()
    return Ready(base, prepared, {"split": split, "prepared": stored}, saved), statistics


def _prepare(
    base: Base, config: RunConfig, orders: Mapping[str, list[list[int]]] | None, run_dir: Path
) -> tuple[Prepared, Statistics]:
    statistics = find_statistics(base, config, run_dir)
    give_back_memory()
    return prepare_base(base, config, orders, statistics), statistics


def _share_prepared(
    preparing: Future[tuple[Prepared, Statistics]],
) -> tuple[Any, Prepared, Statistics]:
    """As `share`, with the statistics, which stay here."""
    from cacp_ray.distributed.sharing import share

    prepared, statistics = preparing.result()
    return *share(prepared), statistics


def begin_run(run: RunDirectory, config: RunConfig, base: Base, statistics: Statistics) -> None:
    """Writes what a run starts with, but for model.json."""
    run.write_config(resolved(config))
    save_statistics(run.path / STATISTICS_FILE, statistics, key_of_statistics(base, config))
    run.write_environment(describe_environment(config.seed))


def write_model(run: RunDirectory, config: RunConfig, ready: Ready) -> dict[str, Any]:
    """Measures the base network, and writes model.json; gives back its content."""
    give_back_memory()
    model = describe_model(ready.base, ready.prepared, config)
    run.write_model(model)
    give_back_memory()
    return model


def check_run(config: RunConfig, base: Base) -> None:
    """Refuses what cannot be run, before anything is written.

    Raises:
        ConfigError: Of the strategy or of a logger.
    """
    check_strategy(config, base)
    check_loggers(config.logging)


def _read_model(base: Base, run_dir: Path) -> dict[str, Any] | None:
    """The content of model.json; None of a run that has not begun."""
    if not (run_dir / "model.json").exists():
        return None
    saved = read_object(run_dir / "model.json", ("sha256", "groups", "base"))
    check_weights(base, run_dir)
    return saved
