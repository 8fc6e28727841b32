"""Asks every node, before work begins, whether it could serve.

One task a node, which imports what an evaluator imports. A node that joins later is not asked here:
the pool reports evaluators that cannot be prepared.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.outcomes import describe
from cacp_ray.errors import CacpError, ConfigError
from cacp_ray.versions import installed_versions

if TYPE_CHECKING:  # it needs torch, which a node may lack: that is what is asked
    from cacp_ray.data.streams import ImageStream

TIMEOUT_S = 120.0


def _examine(
    folders: Sequence[str], streams: Sequence["ImageStream"]
) -> tuple[dict[str, str], str]:
    """`installed_versions`, and what cannot be used there; torch must import."""
    import torch  # noqa: F401

    missing = [folder for folder in folders if not os.access(folder, os.R_OK | os.W_OK)]
    if missing:
        return installed_versions(), f"{missing[0]} is not there, or cannot be written to"
    try:
        for stream in streams:
            stream.at(np.arange(1))
    except CacpError as error:
        return installed_versions(), str(error)
    return installed_versions(), ""


def probe_nodes(folders: Sequence[Path] = (), streams: Sequence["ImageStream"] = ()) -> None:
    """Asks all nodes that have CPUs at once.

    Args:
        folders: That all must read and write.
        streams: Images that all must read.

    Raises:
        ConfigError: The first node that lacks a package, has another version, cannot use a folder
            or images, or does not answer.
    """
    head = ray.get_runtime_context().get_node_id()
    others = [node for node, cpus in _serving().items() if cpus > 0 and node != head]
    if not others:
        return
    expected = installed_versions()
    task = ray.remote(num_cpus=0, max_retries=0)(_examine)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(
            [str(folder.resolve()) for folder in folders], list(streams)
        ): node
        for node in others
    }
    addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
    done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=TIMEOUT_S)
    for ref, node in asked.items():
        where = f"node {addresses.get(node, node)}"
        if ref not in done:
            raise ConfigError(
                f"{where} has not answered in {TIMEOUT_S:.0f} s: see `ray status`, take it out of "
                "the cluster or mend it"
            )
        try:
            found, fault = cast(Any, ray.get(ref))
        except RayError as error:
            if node not in _serving():
                continue  # it has left meanwhile, or is about to
            raise ConfigError(
                f"{where} cannot score ({describe(error)}): install there what this machine has, "
                "or start it from the same image"
            ) from error
        for name, version in expected.items():
            if found[name] != version:
                raise ConfigError(
                    f"{where} has {name} {found[name]}, this machine {version}: measurements would "
                    "differ; install the same version, or start all nodes from the same image"
                )
        if fault:
            raise ConfigError(
                f"{where} cannot train: {fault}; runs that are fine-tuned and streamed data must "
                "lie on a folder that all nodes share"
            )


def _serving() -> dict[str, float]:
    """CPUs of the nodes that are there to stay, by id."""
    nodes = read_nodes()
    return {node: cpus for node, cpus in nodes.cpus.items() if node not in nodes.draining}
