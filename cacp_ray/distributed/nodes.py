"""The nodes of the cluster: what they have, and how many evaluators they hold."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray

from cacp_ray.distributed.cluster import is_local
from cacp_ray.distributed.internals import draining_nodes
from cacp_ray.errors import ConfigError
from cacp_ray.io.labels import ANY, Selector, describe_selector, matches

if TYPE_CHECKING:  # imports torch, which a node that is probed may lack
    from cacp_ray.evaluation.gpu import Need

logger = logging.getLogger(__name__)

SHARES = 10_000  # Ray counts a GPU in ten thousandths


@dataclass(frozen=True)
class Nodes:
    """The nodes that are alive at one moment, by their ids."""

    cpus: dict[str, float]
    gpus: dict[str, float]
    draining: frozenset[str]  # those whose end was announced by the cloud or the autoscaler


def read_nodes(labels: Selector = ANY) -> Nodes:
    """Asks the cluster's head for the nodes with these labels."""
    alive = {
        node["NodeID"]: node["Resources"]
        for node in ray.nodes()
        if node["Alive"] and matches(labels, node["Labels"])
    }
    cpus, gpus = (
        {node: has.get(kind, 0.0) for node, has in alive.items()} for kind in ("CPU", "GPU")
    )
    return Nodes(cpus, gpus, frozenset(draining_nodes()) & alive.keys())


def check_labels(labels: Selector, address: str | None, asked_by: str) -> None:
    """Refuses labels that no node of a local Ray has; a cluster may still get such a node.

    `asked_by` names the setting in the message.

    Raises:
        ConfigError: Nothing could ever run.
    """
    if not labels or read_nodes(labels).cpus:
        return
    what = f"no node has the labels that {asked_by} asks for ({describe_selector(labels)})"
    if is_local(address):
        raise ConfigError(f"{what}: leave it out, or join a cluster by --address")
    logger.warning("%s: waiting until one joins", what)


def node_address(node: str) -> str:
    """The IP address of a node, or its id where the cluster no longer knows it."""
    addresses = {row["NodeID"]: row["NodeManagerAddress"] for row in ray.nodes()}
    return addresses.get(node, node)


@dataclass(frozen=True)
class Kind:
    """What an evaluator reserves: CPUs, and a share of a GPU or none."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def room(self, nodes: Nodes, node: str) -> int:
        """Evaluators that the node would hold if it were idle."""
        cpus = int(nodes.cpus[node] / self.cpus)
        if not self.gpus:
            return cpus
        return min(cpus, int(nodes.gpus[node]) * int(1 / self.gpus + 1e-9))  # never across GPUs


@dataclass(frozen=True)
class Room:
    """How many evaluators to ask for."""

    gpu_share: float  # for each evaluator on GPUs; 0 where there are none
    on_gpus: int
    on_cpus: int
    now: int  # evaluators that the cluster has room for at this moment
    device: str = "cpu"  # what they score on: `cpu`, `cuda`, or `cuda and cpu` where either may

    @property
    def total(self) -> int:
        """Evaluators on GPUs and on CPUs."""
        return self.on_gpus + self.on_cpus


def read_free() -> Mapping[str, float]:
    """CPUs (`CPU`) and GPUs (`GPU`) of the cluster that nobody has reserved."""
    return ray.available_resources()


def find_room(
    nodes: Nodes,
    free: Mapping[str, float],  # as `read_free` tells it
    cpus_per_evaluator: int,
    gpus_per_evaluator: float,
    wanted: int | None,
    useful: int,
) -> Room:
    """As many evaluators as are wanted, or as fit now: at least one, at most `useful`.

    Those wanted all have the share of a GPU, in [0, 1]; 0 scores on CPUs. None asks for those that
    fit: on the GPUs, and on the CPUs of nodes without a GPU.
    """
    share = gpus_per_evaluator
    fast, plain = Kind(cpus_per_evaluator, share), Kind(cpus_per_evaluator)
    by_cpu = int(free.get("CPU", 0) / cpus_per_evaluator)
    by_cpu = min(by_cpu, sum(plain.room(nodes, node) for node in nodes.cpus))
    if not share:
        return Room(0.0, 0, min(wanted or max(1, by_cpu), useful), by_cpu)
    with_gpu = {node for node, gpus in nodes.gpus.items() if gpus}
    by_gpu = min(int(free.get("GPU", 0) / share + 1e-9), by_cpu)
    by_gpu = min(by_gpu, sum(fast.room(nodes, node) for node in with_gpu))
    if wanted is not None:
        return Room(share, min(wanted, useful), 0, by_gpu, "cuda")
    others = sum(plain.room(nodes, node) for node in nodes.cpus.keys() - with_gpu)
    on_cpus = min(others, by_cpu - by_gpu)
    on_gpus = min(max(1, by_gpu), useful)  # without a GPU, one evaluator asks for such a node
    rest = min(on_cpus, useful - on_gpus)
    return Room(share, on_gpus, rest, by_gpu + on_cpus, "cuda and cpu")


def find_share(needs: Mapping[str, "Need"], nodes: Nodes, cpus: int) -> float:
    """Share of a GPU for each evaluator; 0 where no node has a GPU.

    As many evaluators share a GPU as fit into its memory, measured on each node, and as its node
    has CPUs for. All ask Ray for the same share, so the node with the fewest decides.
    """
    numbers = [
        min(need.num_evaluators, int(nodes.cpus[node] / cpus / nodes.gpus[node]))
        for node, need in needs.items()
        if node in nodes.cpus
    ]
    # Rounded down: seven shares of 1/7 would be more than Ray has of a GPU.
    return SHARES // max(1, min(numbers)) / SHARES if numbers else 0.0
