"""Asks every node whether it could serve, before work begins.

Each node runs one task that imports what an evaluator imports. Nodes that join later are not asked:
the pool reports evaluators that cannot be prepared.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import ray

from cacp_ray.distributed.nodes import node_address, read_nodes
from cacp_ray.distributed.tasks import describe, on_node, run_tasks
from cacp_ray.errors import CacpError, ConfigError
from cacp_ray.io.environment import installed_versions

if TYPE_CHECKING:  # imports torch, which a node may lack: the probe is to report that
    from cacp_ray.data.streams import ImageStream

TIMEOUT_S = 120.0


def _examine(
    folders: Sequence[str], streams: Sequence["ImageStream"]
) -> tuple[dict[str, str], str]:
    """The node's `installed_versions`, and what it cannot use or an empty string."""
    import torch  # noqa: F401

    versions = installed_versions()
    for folder in folders:
        if not os.access(folder, os.R_OK | os.W_OK):
            return versions, f"{folder} is not there, or cannot be written to"
    try:
        for stream in streams:
            stream.at(np.arange(1))
    except CacpError as error:
        return versions, str(error)
    return versions, ""


def probe_nodes(folders: Sequence[Path] = (), streams: Sequence["ImageStream"] = ()) -> None:
    """Asks all nodes that have CPUs at once; all must read and write the folders.

    Raises:
        ConfigError: A node lacks a package, has another version, cannot use a folder or images, or
            does not answer. The message names the first one.
    """
    head = ray.get_runtime_context().get_node_id()
    others = [node for node, cpus in _serving().items() if cpus > 0 and node != head]
    if not others:
        return
    expected = installed_versions()
    task = ray.remote(num_cpus=0, max_retries=0)(_examine)
    paths = [str(folder.resolve()) for folder in folders]
    answers = dict(
        run_tasks(
            lambda node: on_node(task, node).remote(paths, list(streams)), others, timeout=TIMEOUT_S
        )
    )
    for node in others:
        where = f"node {node_address(node)}"
        if node not in answers:
            raise ConfigError(
                f"{where} has not answered in {TIMEOUT_S:.0f} s: see `ray status`, take it out of "
                "the cluster or mend it"
            )
        answer = answers[node]
        if isinstance(answer, Exception):
            if node not in _serving():
                continue  # it has left since, or is about to
            raise ConfigError(
                f"{where} cannot score ({describe(answer)}): install there what this machine has, "
                "or start it from the same image"
            ) from answer
        versions, fault = answer
        for name, version in expected.items():
            if versions[name] != version:
                raise ConfigError(
                    f"{where} has {name} {versions[name]}, this machine {version}: measurements "
                    "would differ; install the same version, or start all nodes from the same image"
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
