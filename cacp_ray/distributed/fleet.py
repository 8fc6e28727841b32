"""The actors of a pool, whose nodes and processes may come and go: started, watched, replaced.

Ray restarts the actors. One counts as ready once `prepare` has reported back from it. Actors that
wait for a node are the only demand that an autoscaler sees. The demand ends with them, on `close`
or when the driver dies, so nothing has to be taken back.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from cacp_ray.distributed.evaluator import RayEvaluator
from cacp_ray.distributed.nodes import Kind, Nodes, read_nodes
from cacp_ray.distributed.tasks import describe, store
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import ScoreFunction

logger = logging.getLogger(__name__)

PLACES = 2  # candidates in flight per actor: one is scored, the next one waits in its queue
MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 32.0
WATCH_S = 1.0
PATIENCE_S = 20.0
WITHDRAW_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(eq=False)
class Slot:
    """The place of an actor, whichever process fills it now."""

    name: str
    kind: Kind
    actor: Any
    node: str = ""  # id; empty until the process runs
    is_ready: bool = False
    is_draining: bool = False
    starting: ray.ObjectRef | None = None  # call of `locate` or `prepare` in flight
    start_at: float = 0.0  # the actor is not asked again before this
    num_free: int = PLACES
    num_crashes: int = 0  # consecutive deaths of the process while it started
    start_error: str = ""
    waiting_since: float = field(default_factory=time.monotonic)  # for a node
    answered_at: float = 0.0  # last answer, or when an idle actor was given a candidate

    def lose(self) -> None:
        """Notes that its process is gone."""
        if self.node:  # without a node it is waiting for one already
            self.waiting_since = time.monotonic()
        self.is_ready, self.node = False, ""


class Fleet:
    """Slots, each with an actor that is ready, starts, or waits for a node."""

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        counts: Mapping[Kind, int],  # actors of each kind; the last one has no GPU
        most: int | None,
    ) -> None:
        """Starts the actors and returns at once; `RayEvaluatorPool` explains the arguments."""
        self._make_score = make_score
        self._payload = store(payload)
        self._actor_class = ray.remote(RayEvaluator)
        self._kinds = tuple(counts)
        self._most = most
        self._known_nodes = set(read_nodes().cpus)
        self._watch_at = time.monotonic() + WATCH_S
        self._none_ready_since: float | None = None  # set by the first `check`
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        self._num_slots_made = 0
        self.slots: list[Slot] = []  # the pool counts there what it sends
        self.starting: dict[ray.ObjectRef, Slot] = {}  # calls in flight, for the pool to wait for
        room = ray.available_resources().get("CPU", 0) / self._kinds[-1].cpus
        self.first_capacity = max(1, min(sum(counts.values()), int(room)))  # fit at the start
        for kind, count in counts.items():
            if kind.gpus:
                self._payload["gpu"] = ray.put(kind.gpus)
            self._add_slots(kind, count)
        self.start_due()

    @property
    def num_alive(self) -> int:
        """Number of actors that are ready to score."""
        return sum(slot.is_ready for slot in self.slots)

    def watch_nodes(self) -> None:
        """Leaves draining nodes, forgets nodes that are gone, and uses nodes that joined."""
        now = time.monotonic()
        if now < self._watch_at:
            return
        self._watch_at = now + WATCH_S
        nodes = read_nodes()
        for slot in self.slots:
            if slot.node and slot.node not in nodes.cpus:
                slot.lose()
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
        now = time.monotonic()
        for slot in self.slots:
            if slot.is_ready or slot.starting is not None or slot.start_at > now:
                continue
            if slot.node:
                names = [name for name in self._payload if slot.kind.gpus or name != "gpu"]
                payload = {name: self._payload[name] for name in names}
                ref = slot.actor.prepare.remote(self._make_score, payload)
            else:
                ref = slot.actor.locate.remote()
            slot.starting = ref
            self.starting[ref] = slot

    def replace(self, slot: Slot) -> None:
        """Ends the actor of a slot; Ray places the new one anew."""
        ray.kill(slot.actor)
        slot.actor = self._start_actor(slot.kind, slot.name)
        slot.starting = None  # the old actor's answer no longer counts
        slot.lose()

    def take_answer(self, ref: ray.ObjectRef, outcome: object) -> None:
        """Takes the answer of a starting actor to the call `ref`, or its error."""
        slot = self.starting.pop(ref)
        if slot.starting != ref:
            return  # the actor was replaced since
        slot.starting = None
        if isinstance(outcome, str):
            slot.node = outcome
            return
        if not isinstance(outcome, Exception):
            slot.is_ready, slot.num_crashes, slot.start_error = True, 0, ""
            self._was_ready = True
            return
        now = time.monotonic()
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
            slot.lose()

    def check(self) -> None:
        """Warns when no actor has been ready for long.

        Raises:
            EvaluationError: No actor can be prepared.
        """
        now = time.monotonic()
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
            has = ray.cluster_resources()
            asked = Counter(str(slot.kind) for slot in self.slots)
            logger.warning(
                "no evaluator is ready after %.0f s: they ask for %s, the cluster has %g CPU and "
                "%g GPU; still waiting (add nodes, or lower what an evaluator asks)",
                now - self._none_ready_since,
                ", ".join(f"{n} x {kind}" for kind, n in asked.items()),
                has.get("CPU", 0),
                has.get("GPU", 0),
            )

    def close(self) -> None:
        """Ends the actors."""
        slots, self.slots = self.slots, []
        if ray.is_initialized():
            for slot in slots:
                ray.kill(slot.actor)
        self.starting.clear()
        self._payload.clear()

    def _add_slots(self, kind: Kind, count: int) -> None:
        for _ in range(count):
            name = f"evaluator-{self._num_slots_made}"
            self._num_slots_made += 1
            self.slots.append(Slot(name, kind, self._start_actor(kind, name)))

    def _start_actor(self, kind: Kind, name: str) -> Any:
        threads = str(max(1, math.ceil(kind.cpus)))  # evaluators of a broker reserve a little less
        chosen = self._actor_class.options(
            num_cpus=kind.cpus,
            num_gpus=kind.gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="DEFAULT",  # not in the bundle of a Tune trial that makes the pool
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
        )
        return chosen.remote(name)

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
                ray.kill(slot.actor)
