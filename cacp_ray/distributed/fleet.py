"""The actors of a pool, whose nodes and processes may come and go: started, watched, replaced.

Ray restarts the actors. One counts as ready once `prepare` has reported back from it. Actors that
wait for a node are the only demand that an autoscaler sees. The demand ends with them, on `close`
or when the driver dies, so nothing has to be taken back.
"""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import ObjectRef
from ray.exceptions import ActorDiedError, RayActorError

from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.nodes import Kind, Nodes
from cacp_ray.distributed.tasks import describe
from cacp_ray.errors import EvaluationError

logger = logging.getLogger(__name__)

PLACES = 2  # candidates in flight per actor: one is scored, the next one waits in its queue
MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 32.0
WATCH_S = 1.0
PATIENCE_S = 20.0
WITHDRAW_S = 60.0


@dataclass(eq=False)
class Slot:
    """The place of an actor, whichever process fills it now."""

    name: str
    kind: Kind
    actor: Any
    waiting_since: float  # for a node
    node: str = ""  # id; empty until the process runs
    is_ready: bool = False
    is_draining: bool = False
    starting: ObjectRef | None = None  # call of `locate` or `prepare` in flight
    start_at: float = 0.0  # the actor is not asked again before this
    num_free: int = PLACES
    num_crashes: int = 0  # consecutive deaths of the process while it started
    start_error: str = ""
    answered_at: float = 0.0  # last answer, also to `prepare`, or first candidate when idle

    def lose(self, now: float) -> None:
        """Notes that its process is gone."""
        if self.node:  # without a node it is waiting for one already
            self.waiting_since = now
        self.is_ready, self.node = False, ""


class Fleet:
    """Slots, each with an actor that is ready, starts, or waits for a node."""

    def __init__(
        self,
        actors: RayActors,
        counts: Mapping[Kind, int],  # of each kind; the last one has no GPU
        most: int | None,
    ) -> None:
        """Starts the actors and returns at once; `RayEvaluatorPool` explains the arguments."""
        self._actors = actors
        self._kinds = tuple(counts)
        self._most = most
        self._known_nodes = set(actors.nodes().cpus)
        self._watch_at = actors.now() + WATCH_S
        self._none_ready_since: float | None = None  # set by the first `check`
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        self._num_slots_made = 0
        self.slots: list[Slot] = []  # the pool counts there what it sends
        self.starting: dict[ObjectRef, Slot] = {}  # calls in flight, for the pool to wait for
        room = actors.free_cpus() / self._kinds[-1].cpus
        self.first_capacity = max(1, min(sum(counts.values()), int(room)))  # fit at the start
        for kind, count in counts.items():
            self._add_slots(kind, count)
        self.start_due()

    @property
    def num_alive(self) -> int:
        """Number of actors that are ready to score."""
        return sum(slot.is_ready for slot in self.slots)

    def watch_nodes(self) -> None:
        """Leaves draining nodes, forgets nodes that are gone, and uses nodes that joined."""
        now = self._actors.now()
        if now < self._watch_at:
            return
        self._watch_at = now + WATCH_S
        nodes = self._actors.nodes()
        for slot in self.slots:
            if slot.node and slot.node not in nodes.cpus:
                slot.lose(now)
            slot.is_draining = slot.node in nodes.draining
            if slot.is_draining and slot.num_free == PLACES:
                logger.debug("%s leaves a draining node", slot.name)
                self.replace(slot)
        joined = nodes.cpus.keys() - self._known_nodes
        self._known_nodes |= joined
        if joined:  # actors that wait for their next try may be starting there
            for slot in self.slots:
                slot.start_at, slot.num_crashes = now, 0
        if self._most is not None:
            for kind in self._kinds:
                own = [node for node in joined if self._kind_on(nodes, node) == kind]
                room = sum(kind.room(nodes, node) for node in own)
                self._follow(kind, room, self._most, now)

    def start_due(self) -> None:
        """Asks actors that are not ready for their node, then to build their score function."""
        now = self._actors.now()
        for slot in self.slots:
            if slot.is_ready or slot.starting is not None or slot.start_at > now:
                continue
            if slot.node:
                ref = self._actors.prepare(slot.actor, slot.kind)
            else:
                ref = self._actors.locate(slot.actor)
            slot.starting = ref
            self.starting[ref] = slot

    def replace(self, slot: Slot) -> None:
        """Ends the actor of a slot; Ray places the new one anew."""
        self._actors.kill(slot.actor)
        slot.actor = self._actors.start(slot.kind, slot.name)
        slot.starting = None  # the old actor's answer no longer counts
        slot.lose(self._actors.now())

    def take_answer(self, ref: ObjectRef, outcome: object) -> None:
        """Takes the answer of a starting actor to the call `ref`, or its error."""
        slot = self.starting.pop(ref)
        if slot.starting != ref:
            return  # the actor was replaced since
        slot.starting = None
        if isinstance(outcome, str):
            slot.node = outcome
            return
        now = self._actors.now()
        if not isinstance(outcome, Exception):
            slot.is_ready, slot.num_crashes, slot.start_error = True, 0, ""
            slot.answered_at = now  # calls of the process before may not have failed yet
            self._was_ready = True
            return
        slot.start_at = now + min(RETRY_DELAY_S * 2**slot.num_crashes, MAX_RETRY_DELAY_S)
        is_lost = isinstance(outcome, RayActorError)
        slot.num_crashes += is_lost
        # Once one actor could build its score function, losses are the nodes' fault.
        if not is_lost or (slot.num_crashes >= MAX_START_CRASHES and not self._was_ready):
            if not slot.start_error and self._was_ready:
                reason = f"{slot.name} cannot be prepared: {describe(outcome)}"
                logger.warning("%s; the others go on, it is tried again", reason)
            slot.start_error = describe(outcome)
            self._first_error_at = min(self._first_error_at, now)
        if isinstance(outcome, ActorDiedError):  # Ray may not restart it
            self.replace(slot)
        elif is_lost:
            slot.lose(now)

    def check(self) -> None:
        """Warns when no actor has been ready for long.

        Raises:
            EvaluationError: No actor can be prepared.
        """
        now = self._actors.now()
        if self.num_alive:
            self._none_ready_since, self._first_error_at = now, math.inf
            self._has_warned = False
            return
        errors = [(slot.name, slot.start_error) for slot in self.slots if slot.start_error]
        # Before any was ready, do not wait for all to fail: some may wait for a node for ever.
        is_hopeless = not self._was_ready and now - self._first_error_at > PATIENCE_S
        if errors and (is_hopeless or len(errors) == len(self.slots)):
            name, reason = errors[0]
            raise EvaluationError(
                f"no evaluator can be prepared ({name}: {reason}): fix that, or see it with its "
                "traceback by running without Ray (LocalEvaluator)"
            )
        if self._none_ready_since is None:
            self._none_ready_since = now
        if now - self._none_ready_since > PATIENCE_S and not self._has_warned:
            self._has_warned = True
            nodes = self._actors.nodes()
            asked = Counter(str(slot.kind) for slot in self.slots)
            logger.warning(
                "no evaluator is ready after %.0f s: they ask for %s, the cluster has %g CPU and "
                "%g GPU; still waiting (add nodes, or lower what an evaluator asks)",
                now - self._none_ready_since,
                ", ".join(f"{n} x {kind}" for kind, n in asked.items()),
                sum(nodes.cpus.values()),
                sum(nodes.gpus.values()),
            )

    def close(self) -> None:
        """Ends the actors."""
        slots, self.slots = self.slots, []
        for slot in slots:
            self._actors.kill(slot.actor)
        self.starting.clear()
        self._actors.close()

    def _add_slots(self, kind: Kind, count: int) -> None:
        for _ in range(count):
            name = f"evaluator-{self._num_slots_made}"
            self._num_slots_made += 1
            actor = self._actors.start(kind, name)
            self.slots.append(Slot(name, kind, actor, waiting_since=self._actors.now()))

    def _kind_on(self, nodes: Nodes, node: str) -> Kind:
        return next(kind for kind in self._kinds if not kind.gpus or nodes.gpus[node])

    def _follow(self, kind: Kind, room: int, most: int, now: float) -> None:
        """Adds actors of a kind for nodes that joined; removes those that wait in vain."""
        waiting = [slot for slot in self.slots if not slot.node and slot.kind == kind]
        self._add_slots(kind, max(0, min(room - len(waiting), most - len(self.slots))))
        own = [slot for slot in self.slots if slot.kind == kind]
        for slot in waiting[: len(own) - 1]:  # one stays, to ask for a node
            if not room and now - slot.waiting_since > WITHDRAW_S:
                self.slots.remove(slot)
                slot.starting = None  # its answer no longer counts
                self._actors.kill(slot.actor)
