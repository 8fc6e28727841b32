"""Which nodes of the cluster can serve, and which are about to go."""

from dataclasses import dataclass

import ray
from ray._private.state import state as cluster_state


@dataclass(frozen=True)
class Nodes:
    """The nodes at a moment.

    Attributes:
        cpus: CPUs of each node that is there, by its id.
        gpus: GPUs of the same.
        draining: Those of them that are leaving, as the cloud or the autoscaler has announced.
    """

    cpus: dict[str, float]
    gpus: dict[str, float]
    draining: frozenset[str]


def read_nodes() -> Nodes:
    """Asks the cluster's head."""
    alive = {node["NodeID"]: node["Resources"] for node in ray.nodes() if node["Alive"]}
    cpus, gpus = (
        {node: has.get(kind, 0.0) for node, has in alive.items()} for kind in ("CPU", "GPU")
    )
    # Ray has no public name for this; its own Train reads it the same way.
    draining = cluster_state.get_draining_nodes()
    return Nodes(cpus, gpus, frozenset(draining) & alive.keys())
