"""Final subnets are built where evaluators ran: the driver's machine may be the smallest of all."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from cacp_ray.data.images import ImageSet
from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.outcomes import describe
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.building import Builder, Built
from cacp_ray.evaluation.measurement import Subnet
from cacp_ray.evaluation.preparation import Prepared

logger = logging.getLogger(__name__)

SAY_SECONDS = 60.0
RETRIES = 10  # after a process that died or a node that went


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
        gpus: Share of a GPU of each; 0: none.

    Returns:
        What each became, in their order, as they come.

    Raises:
        EvaluationError: One cannot be built.
    """
    gpus = (
        gpus if any(read_nodes().gpus.values()) else 0.0
    )  # evaluators of a mixed cluster do without
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=RETRIES)(_build)
    waiting = [task.remote(subnet, prepared, split, settings, cpus, gpus) for subnet in subnets]
    while waiting:
        if not ray.wait(waiting[:1], timeout=SAY_SECONDS)[0]:
            logger.info("%d networks are still being built, or wait for a node", len(waiting))
            continue
        try:
            yield ray.get(waiting.pop(0))
        except RayError as error:
            raise EvaluationError(
                f"a final subnet cannot be built: {describe(error)}; mend that, or give nodes more "
                "memory, and run again with --resume"
            ) from error


def _build(
    subnet: Subnet,
    prepared: Prepared,
    split: ImageSet,
    settings: dict[str, Any],
    cpus: int,
    gpus: float,
) -> Built:
    import torch

    from cacp_ray.evaluation.gpu import open_gpu

    torch.set_num_threads(cpus)
    if gpus:
        open_gpu(gpus)
    return Builder(prepared, split, device="cuda" if gpus else "cpu", **settings)(subnet)
