"""Builds final subnets where evaluators ran: the driver's machine may be the smallest of all."""

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import ray

from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.tasks import describe, run_tasks
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.building import Builder, Built
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.measurement import SubnetKey
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.io.environment import with_same_versions

logger = logging.getLogger(__name__)

SAY_SECONDS = 60.0
MAX_ATTEMPTS = 10  # where processes die or nodes go


def is_alone() -> bool:
    """Whether this machine has CPUs and is the only node, so that nothing else could build."""
    cpus, own = read_nodes().cpus, ray.get_runtime_context().get_node_id()
    return cpus.keys() == {own} and cpus[own] > 0


def build_on_nodes(
    subnets: Sequence[SubnetKey],
    prepared: ray.ObjectRef,
    task: ray.ObjectRef,  # what scores them
    settings: dict[str, Any],  # keyword arguments of `Builder`
    *,
    cpus: int,
    gpus: float,  # share of a GPU; tasks get none while the cluster has no GPU
) -> Iterator[Built]:
    """Builds all subnets at once, as tasks with these CPUs and GPUs; yields them in their order.

    Raises:
        EvaluationError: A subnet cannot be built.
    """
    build = with_same_versions(_build)
    on_cpu = ray.remote(num_cpus=cpus, max_retries=0)(build)
    # The process ends with the task, or it would keep the GPU's memory. `options` cannot say so.
    on_gpu = ray.remote(num_cpus=cpus, num_gpus=gpus, max_calls=1, max_retries=0)(build)
    shares: dict[SubnetKey, float] = {}

    def begin(subnet: SubnetKey) -> Any:
        share = shares[subnet] = gpus if _has_gpus() else 0.0
        remote: Any = on_gpu if share else on_cpu
        return remote.remote(subnet, prepared, task, settings, cpus, share)

    for _, outcome in run_tasks(
        begin,
        subnets,
        name="a final subnet",
        in_order=True,
        max_attempts=MAX_ATTEMPTS,
        is_stuck=lambda subnet: shares[subnet] > 0 and not _has_gpus(),  # GPUs may be gone for good
        say=lambda left: logger.info("networks being built, or waiting for a node: %d", left),
        say_seconds=SAY_SECONDS,
    ):
        if isinstance(outcome, Exception):
            raise EvaluationError(
                f"a final subnet cannot be built: {describe(outcome)}; mend that, or give nodes "
                "more memory, and run again with --resume, in Python resume=True"
            ) from outcome
        yield outcome


def _has_gpus() -> bool:
    nodes = read_nodes()
    return any(gpus for node, gpus in nodes.gpus.items() if node not in nodes.draining)


def _build(
    subnet: SubnetKey,
    prepared: Prepared,
    task: Classification | OwnTask,
    settings: dict[str, Any],
    cpus: int,
    gpus: float,
) -> Built:
    import torch

    from cacp_ray.evaluation.gpu import open_gpu

    torch.set_num_threads(cpus)
    if gpus:
        open_gpu(gpus)
    return Builder(prepared, task, device="cuda" if gpus else "cpu", **settings)(subnet)
