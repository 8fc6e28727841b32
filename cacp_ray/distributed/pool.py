"""Evaluator actors on a Ray cluster whose nodes and processes may come and go.

The pool, not Ray, resubmits a candidate whose evaluator was lost: Ray would retry one that crashes
its process for ever, and on an actor that may never come back. Scoring is pure, so that is safe.
Ray only restarts the actors; one counts as ready when `prepare` has reported back from it.

Actors that wait for a node are all that the pool asks of an autoscaler: the demand ends with them,
on `close` or when the driver dies, and nothing has to be taken back.
"""

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from cacp_ray.distributed.evaluator import NotPreparedError, RayEvaluator
from cacp_ray.distributed.metrics import PoolMetrics
from cacp_ray.distributed.nodes import Nodes, read_nodes
from cacp_ray.distributed.outcomes import as_failed, describe, get_outcome
from cacp_ray.distributed.slots import PLACES, Flight, Kind, Slot, Work
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

logger = logging.getLogger(__name__)

MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 32.0
WATCH_S = 1.0
PATIENCE_S = 20.0
WITHDRAW_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class RayEvaluatorPool:
    """Scores on Ray actors; implements the Evaluator port.

    Results come in any order, each candidate exactly once. Actors start in the background.
    """

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        *,
        num_evaluators: int,
        cpus_per_evaluator: float,
        num_gpu_evaluators: int = 0,
        gpus_per_evaluator: float = 0.0,
        max_attempts: int = 3,
        follows_nodes: bool = False,
    ) -> None:
        """Starts the actors and returns at once.

        Args:
            make_score: Called once in every actor's process as `make_score(**payload)`. It must be
                importable there.
            payload: What scoring needs. Each value is stored once; an actor reads numpy arrays,
                also inside containers, without a copy and read-only.
            num_evaluators: Actors to ask for, whether there is room for them yet or not.
            cpus_per_evaluator: CPUs an actor reserves; also its threads, at least 1.
            num_gpu_evaluators: Actors with a share of a GPU to ask for beside them;
                `make_score(**payload, gpu=share)` is called in those.
            gpus_per_evaluator: That share.
            max_attempts: Tries of one candidate before it is given up as failed; a try lost to an
                announced preemption does not count.
            follows_nodes: Ask for as many as there is room for instead: these at first, more when
                nodes join, and none that has found no room for a minute. Where actors have shares
                of GPUs, those without are asked for nodes that have no GPU.
        """
        self._make_score = make_score
        self._payload = {name: ray.put(value) for name, value in payload.items()}
        self._max_attempts = max_attempts
        self._actor_class = ray.remote(RayEvaluator)
        self._plain = Kind(cpus_per_evaluator)
        self._fast = Kind(cpus_per_evaluator, gpus_per_evaluator) if gpus_per_evaluator else None
        if self._fast is not None:
            self._payload["gpu"] = ray.put(gpus_per_evaluator)
        self._metrics = PoolMetrics()
        self._queue: deque[Work] = deque()
        self._flights: dict[ray.ObjectRef, Flight] = {}
        self._starting: dict[ray.ObjectRef, Slot] = {}
        self._follows_nodes = follows_nodes
        self._known_nodes = set(read_nodes().cpus)
        self._watch_at = time.monotonic() + WATCH_S
        self._none_ready_since = time.monotonic()
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        self._num_slots_made = 0
        self._slots: list[Slot] = []
        room = ray.available_resources().get("CPU", 0) / cpus_per_evaluator
        total = num_evaluators + num_gpu_evaluators
        self._first_capacity = max(1, min(total, int(room)))
        if self._fast is not None:  # before others take their CPUs
            self._add_slots(self._fast, num_gpu_evaluators)
        self._add_slots(self._plain, num_evaluators)
        self._start_due()

    @property
    def capacity(self) -> int:
        """Candidates that keep every ready actor busy; before any is, one for each with room."""
        return PLACES * self.num_alive or min(self._first_capacity, len(self._slots))

    @property
    def num_alive(self) -> int:
        """Actors ready to score, as of the last `results`."""
        return sum(slot.is_ready for slot in self._slots)

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate; it leaves at once where an actor has a free place."""
        self._queue.append(Work(candidate))
        self._dispatch()

    def results(self, timeout: float) -> list[Measurement]:
        """All measurements that are there; waits up to `timeout` seconds for a first one.

        Returns at once when no candidate is outstanding.

        Raises:
            EvaluationError: No actor can be prepared (`make_score` fails).
        """
        deadline = time.monotonic() + timeout
        measurements = self._poll(0.0)
        while not measurements and (self._queue or self._flights):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                break
            measurements = self._poll(remaining)
        return measurements

    def close(self) -> None:
        """Ends the actors; outstanding candidates are dropped."""
        slots, self._slots = self._slots, []
        self._metrics.show(waiting=0, scoring=0, alive=0)
        if ray.is_initialized():
            for slot in slots:
                ray.kill(slot.actor)
        self._queue.clear()
        self._flights.clear()
        self._starting.clear()
        self._payload.clear()

    def _add_slots(self, kind: Kind, count: int) -> None:
        for _ in range(count):
            name = f"evaluator-{self._num_slots_made}"
            self._num_slots_made += 1
            self._slots.append(Slot(name, kind, self._start_actor(kind, name)))

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

    def _start_due(self) -> None:
        """Asks actors that are not ready where they are, then to build their score function."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.is_ready or slot.starting is not None or slot.start_at > now:
                continue
            if slot.node:
                names = [name for name in self._payload if slot.kind.gpus or name != "gpu"]
                payload = {name: self._payload[name] for name in names}
                ref = slot.actor.prepare.remote(self._make_score, payload)
            else:
                ref = slot.actor.locate.remote()
            slot.starting = ref
            self._starting[ref] = slot

    def _watch_nodes(self) -> None:
        """Leaves nodes that are draining, forgets those that are gone, uses those that joined."""
        now = time.monotonic()
        if now < self._watch_at:
            return
        self._watch_at = now + WATCH_S
        waiting, scoring = len(self._queue), len(self._flights)
        self._metrics.show(waiting=waiting, scoring=scoring, alive=self.num_alive)
        nodes = read_nodes()
        for slot in self._slots:
            if slot.node and slot.node not in nodes.cpus:
                slot.lose()
            slot.is_draining = slot.node in nodes.draining
            if slot.is_draining and slot.num_free == PLACES:
                logger.debug("%s leaves a node that is draining", slot.name)
                self._replace(slot)
        joined = nodes.cpus.keys() - self._known_nodes
        self._known_nodes |= joined
        if self._follows_nodes:
            for kind in filter(None, (self._fast, self._plain)):
                own = [node for node in joined if self._kind_on(nodes, node) == kind]
                self._follow(kind, sum(kind.room(nodes, node) for node in own), now)

    def _kind_on(self, nodes: Nodes, node: str) -> Kind:
        return self._fast if self._fast is not None and nodes.gpus[node] else self._plain

    def _follow(self, kind: Kind, room: int, now: float) -> None:
        """Actors of a kind for nodes that joined; those that wait in vain are taken back."""
        waiting = [slot for slot in self._slots if not slot.node and slot.kind == kind]
        self._add_slots(kind, max(0, room - len(waiting)))
        own = [slot for slot in self._slots if slot.kind == kind]
        for slot in waiting[: len(own) - 1]:  # one always asks for a node
            if not room and now - slot.waiting_since > WITHDRAW_S:
                self._slots.remove(slot)
                ray.kill(slot.actor)

    def _replace(self, slot: Slot) -> None:
        """A new actor, which Ray places anew."""
        ray.kill(slot.actor)
        slot.actor = self._start_actor(slot.kind, slot.name)
        slot.starting = None  # what the old one answers no longer counts
        slot.lose()

    def _dispatch(self) -> None:
        """Sends queued candidates to free places, the least loaded actor first.

        A candidate that failed somewhere waits for an actor that has not tried it, as long as
        there is a ready one, and that actor gets nothing new meanwhile.
        """
        ready = [slot for slot in self._slots if slot.is_ready and not slot.is_draining]
        reserved: list[Slot] = []
        waiting: list[Work] = []
        while self._queue and any(slot.num_free for slot in ready if slot not in reserved):
            work = self._queue.popleft()
            untried = [slot for slot in ready if slot.name not in work.tried] or ready
            choice = [slot for slot in untried if slot not in reserved]
            slot = max(choice, key=lambda slot: slot.num_free, default=None)
            if slot is None or slot.num_free < work.num_places:
                waiting.append(work)
                reserved += [slot] if slot else []
                continue
            slot.num_free -= work.num_places
            ref = slot.actor.score.remote(work.candidate, work.attempt)
            self._flights[ref] = Flight(slot, work, work.num_places)
        self._queue.extendleft(reversed(waiting))

    def _poll(self, timeout: float) -> list[Measurement]:
        """One wait of at most `timeout` seconds, then everything that is ready."""
        self._watch_nodes()
        self._start_due()
        self._dispatch()
        finished = self._wait(timeout)
        measurements: list[Measurement] = []
        for ref in finished:
            outcome = get_outcome(ref)
            if ref in self._starting:
                slot = self._starting.pop(ref)
                if slot.starting == ref:
                    self._note_started(slot, outcome)
                continue
            flight = self._flights.pop(ref)
            flight.slot.num_free += flight.num_places
            if isinstance(outcome, Measurement):
                if outcome.error:
                    logger.warning("%s: %s", flight.slot.name, outcome.error)
                measurements.append(outcome)
            else:
                measurements += self._fail(flight, outcome)
        self._metrics.count(measurements)
        self._check_started()
        if finished:
            self._start_due()
            self._dispatch()
        return measurements

    def _wait(self, timeout: float) -> list[ray.ObjectRef]:
        refs = [*self._flights, *self._starting]
        if not refs:
            time.sleep(min(timeout, RETRY_DELAY_S / 4))  # every actor waits to be tried again
            return []
        finished, pending = ray.wait(refs, num_returns=len(refs), timeout=0)
        if finished or timeout <= 0:
            return finished
        finished, _ = ray.wait(pending, num_returns=1, timeout=min(timeout, RETRY_DELAY_S))
        return finished

    def _fail(self, flight: Flight, error: Exception) -> list[Measurement]:
        """Queues the candidate for another actor, or gives it up."""
        work, slot = flight.work, flight.slot
        is_counted = True
        if isinstance(error, RayTaskError) and not isinstance(error, NotPreparedError):
            reason = f"scoring raised {describe(error)}"
        else:
            reason = f"lost with {slot.name}: {describe(error)}"
            is_preempted = isinstance(error, RayActorError) and error.preempted
            is_counted = not (is_preempted or isinstance(error, NotPreparedError))
            slot.lose()
        if is_counted:
            work.tried.add(slot.name)
            if work.attempt >= self._max_attempts:
                logger.warning("candidate %d is given up: %s", work.candidate.index, reason)
                return [as_failed(work.candidate.index, work.attempt, slot.name, reason)]
            work.attempt += 1
        logger.debug("candidate %d is tried again: %s", work.candidate.index, reason)
        self._queue.appendleft(work)
        return []

    def _note_started(self, slot: Slot, outcome: Any) -> None:
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
            self._replace(slot)
        elif is_lost:
            slot.lose()

    def _check_started(self) -> None:
        """Notices when waiting for actors is in vain, or may be."""
        now = time.monotonic()
        if self.num_alive:
            self._none_ready_since, self._first_error_at = now, math.inf
            self._has_warned = False
            return
        errors = [(slot.name, slot.start_error) for slot in self._slots if slot.start_error]
        # Before the first is ready, some may wait for nodes for ever: do not wait for all to fail.
        is_hopeless = not self._was_ready and now - self._first_error_at > PATIENCE_S
        if errors and (is_hopeless or len(errors) == len(self._slots)):
            name, reason = errors[0]
            raise EvaluationError(
                f"no evaluator can be prepared ({name}: {reason}): fix that, or see it with its "
                "traceback by running without Ray (LocalEvaluator)"
            )
        if now - self._none_ready_since > PATIENCE_S and not self._has_warned:
            self._has_warned = True
            has = ray.cluster_resources()
            asked = Counter(str(slot.kind) for slot in self._slots)
            logger.warning(
                "no evaluator is ready after %.0f s: they ask for %s, the cluster has %g CPU and "
                "%g GPU; still waiting (add nodes, or lower what an evaluator asks)",
                now - self._none_ready_since,
                ", ".join(f"{n} x {kind}" for kind, n in asked.items()),
                has.get("CPU", 0),
                has.get("GPU", 0),
            )
