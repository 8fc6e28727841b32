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
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayTaskError

from cacp_ray.distributed.evaluator import NotPreparedError, RayEvaluator
from cacp_ray.distributed.metrics import PoolMetrics
from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.outcomes import as_failed, describe, get_outcome
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

logger = logging.getLogger(__name__)

PLACES = 2  # candidates in flight per actor: one is scored, the next one waits beside it
MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
MAX_RETRY_DELAY_S = 32.0
WATCH_S = 1.0
PATIENCE_S = 20.0
WITHDRAW_S = 60.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(eq=False)
class _Slot:
    """A place for an actor, whichever process or actor fills it now."""

    name: str
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

    def lose(self) -> None:
        """Its process is gone."""
        self.is_ready, self.node, self.waiting_since = False, "", time.monotonic()


@dataclass(eq=False)
class _Work:
    """A candidate that has no measurement yet.

    One that failed before travels alone: should it crash its process again, nobody else is hit.
    """

    candidate: Candidate
    attempt: int = 1
    tried: set[str] = field(default_factory=set)

    @property
    def num_places(self) -> int:
        return PLACES if self.tried else 1


@dataclass(eq=False)
class _Flight:
    """A candidate on an actor."""

    slot: _Slot
    work: _Work
    num_places: int


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
            max_attempts: Tries of one candidate before it is given up as failed; a try lost to an
                announced preemption does not count.
            follows_nodes: Ask for as many as there is room for instead: `num_evaluators` at first,
                more when nodes join, and none that has found no room for a minute.
        """
        self._make_score = make_score
        self._payload = {name: ray.put(value) for name, value in payload.items()}
        self._cpus = cpus_per_evaluator
        self._max_attempts = max_attempts
        threads = str(max(1, math.ceil(cpus_per_evaluator)))  # a broker reserves a little less
        self._actor_class = ray.remote(RayEvaluator).options(
            num_cpus=cpus_per_evaluator,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="DEFAULT",  # inside a Tune trial: not in the trial's bundle
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
        )
        self._metrics = PoolMetrics()
        self._queue: deque[_Work] = deque()
        self._flights: dict[ray.ObjectRef, _Flight] = {}
        self._starting: dict[ray.ObjectRef, _Slot] = {}
        self._follows_nodes = follows_nodes
        self._known_nodes = set(read_nodes().cpus)
        self._watch_at = time.monotonic() + WATCH_S
        self._none_ready_since = time.monotonic()
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        self._num_slots_made = 0
        self._slots: list[_Slot] = []
        room = ray.available_resources().get("CPU", 0) / cpus_per_evaluator
        self._first_capacity = max(1, min(num_evaluators, int(room)))
        self._add_slots(num_evaluators)
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
        self._queue.append(_Work(candidate))
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

    def _add_slots(self, count: int) -> None:
        for _ in range(count):
            name = f"evaluator-{self._num_slots_made}"
            self._num_slots_made += 1
            self._slots.append(_Slot(name, self._actor_class.remote(name)))

    def _start_due(self) -> None:
        """Asks actors that are not ready where they are, then to build their score function."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.is_ready or slot.starting is not None or slot.start_at > now:
                continue
            if slot.node:
                ref = slot.actor.prepare.remote(self._make_score, self._payload)
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
            waiting = [slot for slot in self._slots if not slot.node]
            room = sum(int(nodes.cpus[node] / self._cpus) for node in joined)
            self._add_slots(max(0, room - len(waiting)))
            for slot in waiting[: len(self._slots) - 1]:  # one always asks for a node
                if not room and now - slot.waiting_since > WITHDRAW_S:
                    self._slots.remove(slot)
                    ray.kill(slot.actor)

    def _replace(self, slot: _Slot) -> None:
        """A new actor, which Ray places anew."""
        ray.kill(slot.actor)
        slot.actor = self._actor_class.remote(slot.name)
        slot.starting = None  # what the old one answers no longer counts
        slot.lose()

    def _dispatch(self) -> None:
        """Sends queued candidates to free places, the least loaded actor first.

        A candidate that failed somewhere waits for an actor that has not tried it, as long as
        there is a ready one, and that actor gets nothing new meanwhile.
        """
        ready = [slot for slot in self._slots if slot.is_ready and not slot.is_draining]
        reserved: list[_Slot] = []
        waiting: list[_Work] = []
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
            self._flights[ref] = _Flight(slot, work, work.num_places)
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

    def _fail(self, flight: _Flight, error: Exception) -> list[Measurement]:
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

    def _note_started(self, slot: _Slot, outcome: Any) -> None:
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
            logger.warning(
                "no evaluator is ready after %.0f s: %d of them ask for %g CPU each and the "
                "cluster has %g; still waiting (add nodes, or lower the CPUs of an evaluator)",
                now - self._none_ready_since,
                len(self._slots),
                self._cpus,
                ray.cluster_resources().get("CPU", 0),
            )
