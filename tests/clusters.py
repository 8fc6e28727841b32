"""A cluster that is made up, with a clock of its own: what a pool does, tried without Ray.

It has the methods of `RayActors`. Time passes only in `wait` and `sleep`; processes and nodes are
lost, and nodes join, at moments that a test names with `at`.
"""

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError

from cacp_ray.distributed.evaluator import NotPreparedError
from cacp_ray.distributed.nodes import Kind, Nodes
from cacp_ray.evaluation.measurement import Candidate, Measurement
from tests.small import measurement_of

CRASH, HANG = "crash", "hang"  # what a score function may do instead of an answer

Answer = Measurement | Exception | str


class Preempted(ActorDiedError):
    """The end of an actor on a node whose end was announced."""

    preempted = True


class Call:
    """A call in flight, or with its outcome."""

    outcome: Any = None
    is_done = False

    def end(self, outcome: object) -> None:
        self.outcome, self.is_done = outcome, True


@dataclass(eq=False)
class Actor:
    """An actor: its node, if it has found one, and the calls that it has still to answer."""

    name: str
    kind: Kind
    node: str = ""
    is_prepared: bool = False
    calls: deque[tuple[Call, Callable[[], Any], float]] = field(default_factory=deque)
    ends_at: float | None = None  # of the first call; None while it has not begun
    num_lives: int = 0


def measure(candidate: Candidate, actor: Actor) -> Answer:
    """A score function: top-1 is the candidate's index."""
    return measurement_of(candidate.index, float(candidate.index), 1.0, 0.5, 10, 1.0)


class FakeCluster:
    """Nodes, actors, calls and time.

    Args:
        cpus: CPUs of nodes `n0`, `n1` and so on.
        score: What an actor does with a candidate: a measurement, an exception, CRASH or HANG.
        seconds: Duration of a measurement.
        build: What `prepare` gives: None, an exception or CRASH.
    """

    def __init__(
        self,
        *cpus: float,
        score: Callable[[Candidate, Actor], Answer] = measure,
        seconds: Callable[[Candidate], float] = lambda candidate: 1.0,
        build: Callable[[Actor], Exception | str | None] = lambda actor: None,
    ) -> None:
        self.clock = 0.0
        self.actors: list[Actor] = []
        self.killed: list[Actor] = []
        self.is_closed = False
        self._cpus: dict[str, float] = {}
        self._gpus: dict[str, float] = {}
        self._draining: set[str] = set()
        self._score, self._seconds, self._build = score, seconds, build
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._numbers, self._names = itertools.count(), itertools.count()
        for amount in cpus:
            self.add_node(amount)

    def add_node(self, cpus: float, gpus: float = 0.0) -> str:
        """A node that joins now; returns its id, which no other node ever had."""
        node = f"n{next(self._names)}"
        self._cpus[node], self._gpus[node] = cpus, gpus
        self._place()
        return node

    def remove_node(self, node: str, *, announced: bool = False) -> None:
        """A node that is gone, with all its processes."""
        del self._cpus[node], self._gpus[node]
        for actor in [actor for actor in self.actors if actor.node == node]:
            self.lose_process(actor, announced=announced)

    def drain(self, node: str) -> None:
        """A node whose end is announced."""
        self._draining.add(node)

    def lose_process(self, actor: Actor, *, announced: bool = False) -> None:
        """An actor's process that dies; its calls fail, and it starts again where there is room."""
        error = Preempted() if announced else ActorUnavailableError("lost", None)
        calls, actor.calls = actor.calls, deque()
        actor.node, actor.ends_at, actor.is_prepared = "", None, False
        for call, _, _ in calls:
            call.end(error)
        self._place()

    def at(self, moment: float, do: Callable[[], object]) -> None:
        """Does something when the clock reaches a moment."""
        self._events.append((moment, next(self._numbers), do))
        self._events.sort(key=lambda event: event[:2])

    # What a pool calls.

    def start(self, kind: Kind, name: str) -> Actor:
        actor = Actor(name, kind)
        self.actors.append(actor)
        self._place()
        return actor

    def locate(self, actor: Actor) -> Call:
        return self._call(actor, lambda: actor.node, 0.0)

    def prepare(self, actor: Actor, kind: Kind) -> Call:
        assert actor.kind == kind

        def build() -> object:
            outcome = self._build(actor)
            actor.is_prepared = outcome is None
            return outcome

        return self._call(actor, build, 0.5)

    def score(self, actor: Actor, candidate: Candidate, attempt: int) -> Call:
        def score() -> object:
            if not actor.is_prepared:
                return task_error(NotPreparedError(actor.name))
            answer = self._score(candidate, actor)
            if not isinstance(answer, Measurement):
                return answer
            known = {"evaluator": actor.name, "node": actor.node, "attempt": attempt}
            return Measurement(**vars(answer) | known)

        return self._call(actor, score, self._seconds(candidate))

    def wait(self, calls: Sequence[Call], timeout: float) -> list[Call]:
        deadline = self.clock + timeout
        while not (finished := [call for call in calls if call.is_done]):
            if not self._step(deadline):
                break
        return finished

    def outcome(self, call: Call) -> Any:
        return call.outcome

    def kill(self, actor: Actor) -> None:
        self.killed.append(actor)
        self.actors.remove(actor)
        for call, _, _ in actor.calls:
            self.at(self.clock + 1.0, partial(call.end, ActorDiedError()))
        actor.calls.clear()
        actor.node = ""
        self._place()

    def close(self) -> None:
        self.is_closed = True

    def nodes(self) -> Nodes:
        return Nodes(dict(self._cpus), dict(self._gpus), frozenset(self._draining) & {*self._cpus})

    def free_cpus(self) -> float:
        return sum(self._cpus.values()) - sum(a.kind.cpus for a in self.actors if a.node)

    def now(self) -> float:
        return self.clock

    def sleep(self, seconds: float) -> None:
        deadline = self.clock + seconds
        while self._step(deadline):
            pass

    def _call(self, actor: Actor, do: Callable[[], Any], seconds: float) -> Call:
        call = Call()
        if actor in self.killed:
            call.end(ActorDiedError())
        else:
            actor.calls.append((call, do, seconds))
        return call

    def _place(self) -> None:
        """Actors without a node take the first that has room for them."""
        for actor in self.actors:
            for node, cpus in self._cpus.items():
                there = [other.kind for other in self.actors if other.node == node]
                free = cpus - sum(kind.cpus for kind in there)
                free_gpus = self._gpus[node] - sum(kind.gpus for kind in there)
                fits = actor.kind.cpus <= free and actor.kind.gpus <= free_gpus
                if not actor.node and fits and node not in self._draining:
                    actor.node = node
                    actor.num_lives += 1

    def _step(self, deadline: float) -> bool:
        """Lets time pass to the next thing that happens; False where the deadline comes first."""
        for actor in self.actors:
            if actor.node and actor.calls and actor.ends_at is None:
                actor.ends_at = self.clock + actor.calls[0][2]
        busy = [actor for actor in self.actors if actor.ends_at is not None]
        moments = [(actor.ends_at, 1, actor) for actor in busy]
        moments += [(event[0], 0, None) for event in self._events[:1]]
        moment, _, actor = min(moments, key=lambda m: m[:2], default=(float("inf"), 0, None))
        if moment > deadline:
            self.clock = max(self.clock, deadline)
            return False
        self.clock = max(self.clock, moment)
        if actor is None:
            self._events.pop(0)[2]()
            return True
        call, do, _ = actor.calls[0]
        outcome = do()
        if outcome == CRASH:
            self.lose_process(actor)
        elif outcome == HANG:
            actor.ends_at = float("inf")
        else:
            actor.calls.popleft()
            actor.ends_at = None
            call.end(task_error(outcome) if type(outcome) is ValueError else outcome)
        return True


def task_error(cause: Exception) -> RayTaskError:
    """An exception of a function, as Ray hands it over."""
    return RayTaskError("score", "traceback", cause).as_instanceof_cause()
