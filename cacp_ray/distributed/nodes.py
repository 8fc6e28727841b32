"""Which nodes of the cluster can serve, and which are about to go."""

from dataclasses import dataclass

import ray
from ray._private.state import state as cluster_state


@dataclass(frozen=True)
class Nodes:
    """The nodes at a moment.

    Attributes:
        cpus: CPUs of each node that is there, by its id.
        draining: Those of them that are leaving, as the cloud or the autoscaler has announced.
    """

    cpus: dict[str, float]
    draining: frozenset[str]


def read_nodes() -> Nodes:
    """Asks the cluster's head."""
    alive = {
        node["NodeID"]: node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]
    }
    # Ray has no public name for this; its own Train reads it the same way.
    draining = cluster_state.get_draining_nodes()
    return Nodes(alive, frozenset(draining) & alive.keys())
