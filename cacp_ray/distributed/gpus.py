"""How many evaluators score on each GPU: measured on the GPUs that the cluster has."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cacp_ray.distributed.nodes import Nodes, read_nodes
from cacp_ray.distributed.outcomes import describe
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.gpu import Need

logger = logging.getLogger(__name__)

SAY_SECONDS = 30.0
TIMEOUT_S = 300.0
FREE_TIMEOUT_S = 20.0
SHARES = 10_000  # Ray counts a GPU in ten thousandths


def measure_on_gpus(
    measure: Callable[..., Any], arguments: Mapping[str, Any], cpus: int
) -> dict[str, Any]:
    """What a function finds on a GPU of each node that has one, by node.

    It runs in a process of its own, which ends with it, and has the whole GPU; when this returns,
    Ray can give that to others. Nodes that leave, or whose GPUs are others' for five minutes, are
    left out, and with a warning those where it fails: nothing is found where no GPU is or becomes
    free.

    Args:
        measure: To call.
        arguments: Of it, values or references.
        cpus: To reserve beside the GPU.

    Raises:
        ConfigError: It fails on every node.
    """
    nodes, before = read_nodes(), ray.available_resources()
    stored = {
        name: value if isinstance(value, ray.ObjectRef) else ray.put(value)
        for name, value in arguments.items()
    }
    task = ray.remote(num_cpus=cpus, num_gpus=1, max_calls=1, max_retries=0)(measure)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            **stored
        ): node
        for node, gpus in nodes.gpus.items()
        if gpus >= 1 and nodes.cpus[node] >= cpus and node not in nodes.draining
    }
    deadline, done, waiting = time.monotonic() + TIMEOUT_S, [], list(asked)
    while waiting and time.monotonic() < deadline:
        some, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SAY_SECONDS)
        done += some
        if waiting:
            logger.info("GPUs are measured: %d nodes have not answered", len(waiting))
    for ref in waiting:
        ray.cancel(ref, force=True)
    found, faults = {}, []
    for ref in done:
        try:
            found[asked[ref]] = cast(Any, ray.get(ref))
        except RayError as error:
            if asked[ref] not in read_nodes().cpus:
                continue
            where = f"nothing can be measured on a GPU of node {_address(asked[ref])}"
            faults.append(f"{where}: {describe(error)}")
    if faults and not found:
        raise ConfigError(f"{faults[0]}; mend that, or score on CPUs")
    for fault in faults:
        logger.warning(fault)
    # A task has answered before its process is gone, and only then Ray has the GPU back.
    deadline = time.monotonic() + FREE_TIMEOUT_S
    while asked and not _are_free(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def find_share(needs: Mapping[str, Need], nodes: Nodes, cpus: int) -> float:
    """Share of a GPU for each evaluator; 0 where no node has one.

    As many share a GPU as fit into its memory, and as its node has CPUs for: the least of all
    nodes, as all evaluators ask Ray for the same share.

    Args:
        needs: Measured, by node.
        nodes: The cluster's.
        cpus: Of an evaluator.
    """
    numbers = [
        min(need.num_evaluators, int(nodes.cpus[node] / cpus / nodes.gpus[node]))
        for node, need in needs.items()
        if node in nodes.cpus
    ]
    # Rounded down, or seven of 1/7 would be more than Ray has of a GPU.
    return SHARES // max(1, min(numbers)) / SHARES if numbers else 0.0


def _are_free(before: Mapping[str, float]) -> bool:
    now = ray.available_resources()
    return all(now.get(kind, 0) >= before.get(kind, 0) for kind in ("CPU", "GPU"))


def _address(node: str) -> str:
    return next(
        (each["NodeManagerAddress"] for each in ray.nodes() if each["NodeID"] == node), node
    )
