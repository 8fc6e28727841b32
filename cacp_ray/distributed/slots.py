"""What the pool keeps of its actors and of the candidates on them."""

import time
from dataclasses import dataclass, field
from typing import Any

import ray

from cacp_ray.distributed.nodes import Nodes
from cacp_ray.evaluation.measurement import Candidate

PLACES = 2  # candidates in flight per actor: one is scored, the next one waits beside it


@dataclass(frozen=True)
class Kind:
    """What an actor reserves: CPUs alone, or a share of a GPU beside them."""

    cpus: float
    gpus: float = 0.0

    def __str__(self) -> str:
        return f"{self.cpus:g} CPU" + (f" and {self.gpus:g} GPU" if self.gpus else "")

    def room(self, nodes: Nodes, node: str) -> int:
        """Actors that a node holds, were it idle."""
        cpus = int(nodes.cpus[node] / self.cpus)
        if not self.gpus:
            return cpus
        return min(cpus, int(nodes.gpus[node]) * int(1 / self.gpus + 1e-9))  # never across GPUs


@dataclass(eq=False)
class Slot:
    """A place for an actor, whichever process or actor fills it now."""

    name: str
    kind: Kind
    actor: Any
    node: str = ""  # id, once the process runs
    is_ready: bool = False
    is_draining: bool = False
    starting: ray.ObjectRef | None = None  # `locate`, then `prepare`
    start_at: float = 0.0
    num_free: int = PLACES
    num_crashes: int = 0  # consecutive process deaths while starting
    start_error: str = ""
    waiting_since: float = field(default_factory=time.monotonic)
    answered_at: float = 0.0  # last, or when it was given a candidate while it had none

    def lose(self) -> None:
        """Its process is gone."""
        if self.node:  # else it waits for one already
            self.waiting_since = time.monotonic()
        self.is_ready, self.node = False, ""


@dataclass(eq=False)
class Work:
    """A candidate that has no measurement yet.

    One that failed before travels alone: should it crash its process again, nobody else is hit.
    """

    candidate: Candidate
    attempt: int = 1
    tried: set[str] = field(default_factory=set)
    failed_on: list[str] = field(default_factory=list)  # nodes, one a counted attempt

    @property
    def num_places(self) -> int:
        """What it takes of an actor's."""
        return PLACES if self.tried else 1


@dataclass(eq=False)
class Flight:
    """A candidate on an actor."""

    slot: Slot
    node: str
    work: Work
    num_places: int
