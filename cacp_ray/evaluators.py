"""The evaluators of a run: actors on a connected cluster, and the cache before them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacp_ray.config import ClusterConfig, RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache, key_of_scores
from cacp_ray.evaluation.gpu import Need
from cacp_ray.evaluation.measurement import Evaluator, Measurement, ScoreFunction, Subnet
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.evaluation.scorer import make_scorer, measure_need, read_dtype
from cacp_ray.loading import Base
from cacp_ray.versions import check_versions, installed_versions

if TYPE_CHECKING:
    from cacp_ray.distributed.room import Room


def find_gpu_share(
    config: RunConfig,
    base: Base,
    prepared: Prepared,
    say: Callable[[str], object],
    stored: Mapping[str, Any] | None = None,
) -> float:
    """Of a GPU, for each evaluator: as set, or where that is `auto`, as the cluster's GPUs hold.

    Args are those of `start_evaluators`.

    Raises:
        ConfigError: Memory cannot be measured on a GPU that is there.
    """
    from cacp_ray.distributed.gpus import find_share, measure_on_gpus
    from cacp_ray.distributed.nodes import read_nodes

    asked, cpus = config.cluster.gpus_per_evaluator, config.cluster.cpus_per_evaluator
    if asked != "auto":
        return asked
    arguments = {**scorer_arguments(config, base, prepared, 1.0), **(stored or {})}
    needs = measure_on_gpus(measure_need_alike, with_versions(arguments), cpus)
    nodes = read_nodes()
    if not needs and any(nodes.gpus.values()):
        raise ConfigError(
            f"no GPU was free to measure memory on, with {cpus} CPUs beside it: wait until one is, "
            "or set cluster.gpus_per_evaluator to a number, 0 for CPUs"
        )
    share = find_share(needs, nodes, cpus)
    say(describe_needs(list(needs.values()), share))
    return share


def describe_needs(needs: Sequence[Need], share: float) -> str:
    """What was measured on GPUs, one of a node, and the share that follows."""
    if not share:
        return "GPUs: none is there now, so evaluators score on CPUs"
    taken, gpu = max(each.evaluator for each in needs), min(each.gpu for each in needs)
    return (
        f"GPUs: an evaluator takes about {taken / 2**30:.1f} of {gpu / 2**30:.0f} GB, "
        f"{round(1 / share)} score on each"
    )


def start_evaluators(
    config: RunConfig,
    base: Base,
    prepared: Prepared,
    cache: Path | None,
    say: Callable[[str], object],
    num_measured: int = 0,
    stored: Mapping[str, Any] | None = None,
    gpus: float = 0.0,
) -> tuple[Evaluator, dict[Subnet, Measurement]]:
    """The evaluator of a search, and the measurements that it need not ask for.

    Args:
        config: Of the run.
        base: Its network and images.
        prepared: What all candidates share.
        cache: Folder of measurements by content; None measures all anew.
        say: Takes a line.
        num_measured: Evaluations that the run has made before.
        stored: References of `split` and `prepared`, where Ray has them (`distributed.sharing`).
        gpus: Share of a GPU for each, see `find_gpu_share`.
    """
    from cacp_ray.distributed.pool import RayEvaluatorPool
    from cacp_ray.distributed.room import find_room

    cluster = config.cluster
    # Never more than could work at once, since nodes may be started for them.
    left = max(config.evaluations - num_measured, len(config.rates))
    useful = config.round_size if config.mode == "rounds" else left
    room = find_room(cluster.cpus_per_evaluator, gpus, cluster.max_evaluators, useful)
    say(describe_evaluators(cluster, room))
    pool = RayEvaluatorPool(
        make_scorer_alike,
        with_versions({**scorer_arguments(config, base, prepared, gpus), **(stored or {})}),
        num_evaluators=room.on_cpus,
        cpus_per_evaluator=cluster.cpus_per_evaluator,
        num_gpu_evaluators=room.on_gpus,
        gpus_per_evaluator=room.gpu_share,
        most=useful if cluster.max_evaluators is None else None,
    )
    if cache is None:
        return pool, {}
    found = MeasurementCache(cache, key_of_run(config, base, prepared, room.device))
    images = images_scored(config, base)
    return CachedEvaluator(pool, found, images), found.on(images)


def with_versions(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `make_scorer_alike` and `measure_need_alike`."""
    return {"versions": installed_versions(), **arguments}


def make_scorer_alike(versions: Mapping[str, str], **arguments: Any) -> ScoreFunction:
    """`make_scorer`, where the packages are those of the search: nodes may join at any time.

    Raises:
        ConfigError: One is not.
    """
    check_versions(versions)
    return make_scorer(**arguments)


def measure_need_alike(versions: Mapping[str, str], **arguments: Any) -> Need:
    """`measure_need`, likewise.

    Raises:
        ConfigError: One is not.
    """
    check_versions(versions)
    return measure_need(**arguments)


def describe_evaluators(cluster: ClusterConfig, room: "Room") -> str:
    """How many are asked for, what each reserves, and how many can begin.

    Args:
        cluster: Of the run.
        room: See `cacp_ray.distributed.room`.
    """
    kinds = [
        (room.on_gpus, f"{cluster.cpus_per_evaluator} CPU and {room.gpu_share:g} GPU"),
        (room.on_cpus, f"{cluster.cpus_per_evaluator} CPU"),
    ]
    asked = ", ".join(f"{number:,} with {what} each" for number, what in kinds if number)
    return f"evaluators: {asked}, room for {room.now:,} now"


def scorer_arguments(
    config: RunConfig, base: Base, prepared: Prepared, gpus: float = 0.0
) -> dict[str, Any]:
    """What an evaluator builds its score function from; `gpus` is its share of a GPU."""
    dtype = config.evaluation.dtype
    if not gpus:
        # As this machine has it: nodes with other processors would compute in another one.
        dtype = str(read_dtype(dtype)).removeprefix("torch.")
    return {
        "prepared": prepared,
        "split": base.search,
        "recovery": config.pruning.recovery,
        "batch_size": config.evaluation.batch_size,
        "dtype": dtype,
        "images": config.evaluation.images,
        "threads": config.cluster.cpus_per_evaluator,
    }


def key_of_run(config: RunConfig, base: Base, prepared: Prepared, device: str) -> str:
    """Of the measurements on a device, see `key_of_scores`."""
    dtype = config.evaluation.dtype
    return key_of_scores(
        prepared,
        base.search,
        recovery=config.pruning.recovery,
        # The driver may have no GPU to ask.
        dtype=str(read_dtype(dtype)) if device == "cpu" else f"{device} {dtype}",
    )


def images_scored(config: RunConfig, base: Base) -> int:
    """Images of a whole measurement."""
    return min(config.evaluation.images or len(base.search), len(base.search))
