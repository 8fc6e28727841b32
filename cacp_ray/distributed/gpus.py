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


def measure_on_gpus(
    measure: Callable[..., Any], arguments: Mapping[str, Any], cpus: int
) -> dict[str, Any]:
    """What a function finds on a GPU of each node that has one, by node.

    It runs in a process of its own, which ends with it, and has the whole GPU. Nodes that leave, or
    whose GPUs are others' for five minutes, are left out.

    Args:
        measure: To call.
        arguments: Of it, values or references.
        cpus: To reserve beside the GPU.

    Raises:
        ConfigError: It fails on a node, or no GPU becomes free.
    """
    nodes = read_nodes()
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
            logger.info("memory is measured on GPUs: %d have not answered", len(waiting))
    for ref in waiting:
        ray.cancel(ref, force=True)
    found = {}
    for ref in done:
        try:
            found[asked[ref]] = cast(Any, ray.get(ref))
        except RayError as error:
            if asked[ref] not in read_nodes().cpus:
                continue
            raise ConfigError(
                f"memory cannot be measured on a GPU of node {_address(asked[ref])} "
                f"({describe(error)}): mend that, or set cluster.gpus_per_evaluator to a number, "
                "0 for CPUs"
            ) from error
    if asked and not found:
        raise ConfigError(
            f"no GPU was free for {TIMEOUT_S:.0f} s to measure memory on: wait until one is, or "
            "set cluster.gpus_per_evaluator to a number"
        )
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
    return 1 / max(1, min(numbers)) if numbers else 0.0


def _address(node: str) -> str:
    return next(
        (each["NodeManagerAddress"] for each in ray.nodes() if each["NodeID"] == node), node
    )
