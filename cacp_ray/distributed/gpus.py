"""Measures on the GPUs of a cluster before evaluators are placed there."""

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray

from cacp_ray.distributed.nodes import node_address, read_nodes
from cacp_ray.distributed.tasks import describe, on_node, run_tasks, store
from cacp_ray.errors import ConfigError
from cacp_ray.io.labels import ANY, Selector

logger = logging.getLogger(__name__)

TIMEOUT_S = 300.0
FREE_TIMEOUT_S = 20.0


def measure_on_gpus(
    measure: Callable[..., Any], arguments: Mapping[str, Any], cpus: int, labels: Selector = ANY
) -> dict[str, Any]:
    """Calls a function on a GPU of each node that has one; returns its results by node.

    Each call has a process of its own, which ends with it, and a whole GPU. When this returns, Ray
    can give the GPUs to others. The result leaves out nodes that leave, nodes whose GPUs are taken
    for five minutes, and, with a warning, nodes where the function fails. Nodes
    without these labels are left out too. The arguments by name are values or references in Ray's
    store; `cpus` are reserved with the GPU.

    Raises:
        ConfigError: The function fails on every node.
    """
    nodes, before = read_nodes(labels), ray.available_resources()
    stored = store(arguments)
    task = ray.remote(num_cpus=cpus, num_gpus=1, max_calls=1, max_retries=0)(measure)
    asked = [
        node
        for node, gpus in nodes.gpus.items()
        if gpus >= 1 and nodes.cpus[node] >= cpus and node not in nodes.draining
    ]
    results, faults = {}, []
    for node, outcome in run_tasks(
        lambda node: on_node(task, node).remote(**stored),
        asked,
        timeout=TIMEOUT_S,
        say=lambda left: logger.info("GPUs are measured; nodes left: %d", left),
    ):
        if not isinstance(outcome, Exception):
            results[node] = outcome
        elif node in read_nodes().cpus:
            where = f"nothing can be measured on a GPU of node {node_address(node)}"
            faults.append(f"{where}: {describe(outcome)}")
    if faults and not results:
        raise ConfigError(f"{faults[0]}; mend that, or score on CPUs")
    for fault in faults:
        logger.warning(fault)
    # A task answers before its process is gone; only then does Ray have the GPU back.
    deadline = time.monotonic() + FREE_TIMEOUT_S
    while asked and not _are_free(before) and time.monotonic() < deadline:
        time.sleep(0.05)
    return results


def _are_free(before: Mapping[str, float]) -> bool:
    now = ray.available_resources()
    return all(now.get(kind, 0) >= before.get(kind, 0) for kind in ("CPU", "GPU"))
