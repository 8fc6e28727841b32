"""The actors of a pool, whose nodes and processes may come and go: started, watched, replaced.

Ray restarts the actors; one counts as ready when `prepare` has reported back from it. Actors that
wait for a node are all that is asked of an autoscaler: the demand ends with them, on `close` or
when the driver dies, and nothing has to be taken back.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError

from cacp_ray.distributed.evaluator import RayEvaluator
from cacp_ray.distributed.nodes import Nodes, read_nodes
from cacp_ray.distributed.outcomes import describe
from cacp_ray.distributed.slots import PLACES, Kind, Slot
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import ScoreFunction

logger = logging.getLogger(__name__)

MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 32.0
WATCH_S = 1.0
PATIENCE_S = 20.0
WITHDRAW_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class Fleet:
    """Slots, each with an actor that is ready, starting, or waits for a node.

    Attributes:
        slots: One an actor; the pool counts in them what it sends there.
        starting: What starting actors were asked, for the pool to wait for.
        first_capacity: Actors that there is room for at the start, at least 1.
    """

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        *,
        num_evaluators: int,
        cpus_per_evaluator: float,
        num_gpu_evaluators: int,
        gpus_per_evaluator: float,
        most: int | None,
    ) -> None:
        """Starts the actors and returns at once; arguments as of `RayEvaluatorPool`."""
        self._make_score = make_score
        self._payload = {
            name: value if isinstance(value, ray.ObjectRef) else ray.put(value)
            for name, value in payload.items()
        }
        self._actor_class = ray.remote(RayEvaluator)
        self._plain = Kind(cpus_per_evaluator)
        self._fast = Kind(cpus_per_evaluator, gpus_per_evaluator) if gpus_per_evaluator else None
        if self._fast is not None:
            self._payload["gpu"] = ray.put(gpus_per_evaluator)
        self._most = most
        self._known_nodes = set(read_nodes().cpus)
        self._watch_at = time.monotonic() + WATCH_S
        self._none_ready_since: float | None = None  # nobody has looked yet
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        self._num_slots_made = 0
        self.slots: list[Slot] = []
        self.starting: dict[ray.ObjectRef, Slot] = {}
        room = ray.available_resources().get("CPU", 0) / cpus_per_evaluator
        total = num_evaluators + num_gpu_evaluators
        self.first_capacity = max(1, min(total, int(room)))
        if self._fast is not None:  # before others take their CPUs
            self._add_slots(self._fast, num_gpu_evaluators)
        self._add_slots(self._plain, num_evaluators)
        self.start_due()

    @property
    def num_alive(self) -> int:
        """Actors that are ready to score."""
        return sum(slot.is_ready for slot in self.slots)

    def watch_nodes(self) -> None:
        """Leaves nodes that are draining, forgets those that are gone, uses those that joined."""
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
                logger.debug("%s leaves a node that is draining", slot.name)
                self.replace(slot)
        joined = nodes.cpus.keys() - self._known_nodes
        self._known_nodes |= joined
        if joined:  # whoever has waited long to be asked again, may be starting there
            for slot in self.slots:
                slot.start_at, slot.num_crashes = now, 0
        if self._most is not None:
            for kind in filter(None, (self._fast, self._plain)):
                own = [node for node in joined if self._kind_on(nodes, node) == kind]
                room = sum(kind.room(nodes, node) for node in own)
                self._follow(kind, room, self._most, now)

    def start_due(self) -> None:
        """Asks actors that are not ready where they are, then to build their score function."""
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
        """A new actor, which Ray places anew."""
        ray.kill(slot.actor)
        slot.actor = self._start_actor(slot.kind, slot.name)
        slot.starting = None  # what the old one answers no longer counts
        slot.lose()

    def take_answer(self, ref: ray.ObjectRef, outcome: Any) -> None:
        """Takes what a starting actor has answered to `starting[ref]`, or the error."""
        slot = self.starting.pop(ref)
        if slot.starting != ref:
            return  # that of an actor which is no more
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
        # Once a score function was built, losses are the nodes' fault: wait for other nodes.
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
        """Notices when waiting for actors is in vain, or may be."""
        now = time.monotonic()
        if self.num_alive:
            self._none_ready_since, self._first_error_at = now, math.inf
            self._has_warned = False
            return
        errors = [(slot.name, slot.start_error) for slot in self.slots if slot.start_error]
        # Before the first is ready, some may wait for nodes for ever: do not wait for all to fail.
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
        threads = str(max(1, math.ceil(kind.cpus)))  # a broker reserves a little less
        chosen = self._actor_class.options(
            num_cpus=kind.cpus,
            num_gpus=kind.gpus,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="DEFAULT",  # inside a Tune trial: not in the trial's bundle
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
        )
        return chosen.remote(name)

    def _kind_on(self, nodes: Nodes, node: str) -> Kind:
        return self._fast if self._fast is not None and nodes.gpus[node] else self._plain

    def _follow(self, kind: Kind, room: int, most: int, now: float) -> None:
        """Actors of a kind for nodes that joined; those that wait in vain are taken back."""
        waiting = [slot for slot in self.slots if not slot.node and slot.kind == kind]
        self._add_slots(kind, max(0, min(room - len(waiting), most - len(self.slots))))
        own = [slot for slot in self.slots if slot.kind == kind]
        for slot in waiting[: len(own) - 1]:  # one always asks for a node
            if not room and now - slot.waiting_since > WITHDRAW_S:
                self.slots.remove(slot)
                slot.starting = None  # what it answers no longer counts
                ray.kill(slot.actor)
