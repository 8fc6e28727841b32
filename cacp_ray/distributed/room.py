"""How many evaluators, on what, a connected cluster has room for."""

from dataclasses import dataclass

import ray

from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.slots import Kind


@dataclass(frozen=True)
class Room:
    """Evaluators to ask for.

    Attributes:
        gpu_share: Of a GPU, for each that has one; 0 where none has.
        on_gpus: Evaluators with that share.
        on_cpus: Evaluators without.
        now: That there is room for at this moment.
        device: What they score on: `cpu`, `cuda`, or `cuda and cpu` where either may.
    """

    gpu_share: float
    on_gpus: int
    on_cpus: int
    now: int
    device: str = "cpu"

    @property
    def total(self) -> int:
        """Of both kinds."""
        return self.on_gpus + self.on_cpus


def find_room(
    cpus_per_evaluator: int, gpus_per_evaluator: float, wanted: int | None, useful: int
) -> Room:
    """As many as are wanted, or as there is room for: at least one, and no more than are useful.

    Args:
        cpus_per_evaluator: CPUs of each.
        gpus_per_evaluator: Share of a GPU; 0: none.
        wanted: Evaluators to ask for, which all get the share; None: those that there is room for,
            on GPUs, and on the CPUs of nodes that have none.
        useful: Candidates that are asked together.
    """
    share, nodes, free = gpus_per_evaluator, read_nodes(), ray.available_resources()
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
    on_gpus = min(max(1, by_gpu), useful)  # one asks for a node with a GPU, if there is none
    rest = min(on_cpus, useful - on_gpus)
    return Room(share, on_gpus, rest, by_gpu + on_cpus, "cuda and cpu")
