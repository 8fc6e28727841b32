"""Final subnets are built where evaluators ran: the driver's machine may be the smallest of all.

The driver counts what was tried: of a process that is killed for its memory, Ray itself would start
the task again for ever.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError

from cacp_ray.data.images import ImageSet
from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.outcomes import describe
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.building import Builder, Built
from cacp_ray.evaluation.measurement import Subnet
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.versions import check_versions, installed_versions

logger = logging.getLogger(__name__)

SAY_SECONDS = 60.0
MAX_ATTEMPTS = 10  # where processes die or nodes go


def is_alone() -> bool:
    """Whether this machine is all that could build: it has CPUs, and no other node is there."""
    cpus, own = read_nodes().cpus, ray.get_runtime_context().get_node_id()
    return cpus.keys() == {own} and cpus[own] > 0


def build_on_nodes(
    subnets: Sequence[Subnet],
    prepared: ray.ObjectRef,
    split: ray.ObjectRef,
    settings: dict[str, Any],
    *,
    cpus: int,
    gpus: float,
) -> Iterator[Built]:
    """Builds all subnets at once, each as a task with the resources of an evaluator.

    Args:
        subnets: To build.
        prepared: Of the base network, in Ray's store.
        split: The search split, in Ray's store.
        settings: Of `Builder`.
        cpus: Of each task.
        gpus: Share of a GPU of each; 0: none. Without any GPU in the cluster, they do without.

    Returns:
        What each became, in their order, as they come.

    Raises:
        EvaluationError: One cannot be built.
    """
    on_cpu = ray.remote(num_cpus=cpus, max_retries=0)(_build)
    # Its process ends with it: a share that is given by `options` alone would leave it alive, and
    # the GPU's memory with it.
    on_gpu = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(_build)
    versions = installed_versions()

    def begin(subnet: Subnet) -> tuple[Any, float]:
        share = gpus if _has_gpus() else 0.0
        task = on_gpu if share else on_cpu
        return task.remote(subnet, prepared, split, settings, cpus, share, versions), share

    flights = [begin(subnet) for subnet in subnets]
    attempts: Counter[int] = Counter()
    for number, subnet in enumerate(subnets):
        while True:
            ref, share = flights[number]
            if not ray.wait([ref], timeout=SAY_SECONDS)[0]:
                logger.info(
                    "%d networks are still being built, or wait for a node", len(subnets) - number
                )
                if share and not _has_gpus():  # they have left for good, perhaps
                    ray.cancel(ref, force=True)
                    flights[number] = begin(subnet)
                continue
            try:
                built: Built = cast(Any, ray.get(ref))
            except RayError as error:
                attempts[number] += 1
                if isinstance(error, RayTaskError) or attempts[number] == MAX_ATTEMPTS:
                    raise EvaluationError(
                        f"a final subnet cannot be built: {describe(error)}; mend that, or give "
                        "nodes more memory, and run again with --resume"
                    ) from error
                logger.warning("a final subnet is built again: %s", describe(error))
                flights[number] = begin(subnet)
                continue
            flights[number] = (None, 0.0)  # else Ray keeps the network
            yield built
            break


def _has_gpus() -> bool:
    nodes = read_nodes()
    return any(gpus for node, gpus in nodes.gpus.items() if node not in nodes.draining)


def _build(
    subnet: Subnet,
    prepared: Prepared,
    split: ImageSet,
    settings: dict[str, Any],
    cpus: int,
    gpus: float,
    versions: Mapping[str, str],
) -> Built:
    import torch

    from cacp_ray.evaluation.gpu import open_gpu

    check_versions(versions)
    torch.set_num_threads(cpus)
    if gpus:
        open_gpu(gpus)
    return Builder(prepared, split, device="cuda" if gpus else "cpu", **settings)(subnet)
