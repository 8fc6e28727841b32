"""Evaluator actors on a Ray cluster whose nodes and processes may come and go.

The pool, not Ray, resubmits a candidate whose evaluator was lost: Ray would retry one that crashes
its process for ever, and on an actor that may never come back. Scoring is pure, so that is safe.
Ray only restarts the actors; one counts as ready when `prepare` has reported back from it.
"""

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorDiedError, RayActorError, RayError, RayTaskError

from cacp_ray.distributed.evaluator import NotPreparedError, RayEvaluator
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

logger = logging.getLogger(__name__)

PLACES = 2  # candidates in flight per actor: one is scored, the next one waits beside it
MAX_START_CRASHES = 3
RETRY_DELAY_S = 1.0
PATIENCE_S = 20.0
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(eq=False)
class _Slot:
    """A place for an actor, whichever process or actor fills it now."""

    name: str
    actor: Any
    is_ready: bool = False
    is_preparing: bool = False
    prepare_at: float = 0.0
    num_free: int = PLACES
    num_crashes: int = 0  # consecutive process deaths while preparing
    start_error: str = ""


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

    Results come in any order, each candidate exactly once. Actors start in the background, and
    those that wait for a node are what an autoscaler sees as demand.
    """

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        *,
        num_evaluators: int,
        cpus_per_evaluator: float,
        max_attempts: int = 3,
    ) -> None:
        """Starts the actors and returns at once.

        Args:
            make_score: Called once in every actor's process as `make_score(**payload)`. It must be
                importable there.
            payload: What scoring needs. Each value is stored once; an actor reads numpy arrays,
                also inside containers, without a copy and read-only.
            num_evaluators: Actors to start.
            cpus_per_evaluator: CPUs an actor reserves; also its threads, at least 1.
            max_attempts: Tries of one candidate before it is given up as failed; a try lost to an
                announced preemption does not count.
        """
        self._make_score = make_score
        self._payload = {name: ray.put(value) for name, value in payload.items()}
        self._cpus = cpus_per_evaluator
        self._max_attempts = max_attempts
        threads = str(max(1, int(cpus_per_evaluator)))
        self._actor_class = ray.remote(RayEvaluator).options(
            num_cpus=cpus_per_evaluator,
            max_restarts=-1,
            max_task_retries=0,
            scheduling_strategy="DEFAULT",  # inside a Tune trial: not in the trial's bundle
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
        )
        self._queue: deque[_Work] = deque()
        self._flights: dict[ray.ObjectRef, _Flight] = {}
        self._preparing: dict[ray.ObjectRef, _Slot] = {}
        self._none_ready_since = time.monotonic()
        self._first_error_at = math.inf
        self._was_ready = False
        self._has_warned = False
        names = [f"evaluator-{index}" for index in range(num_evaluators)]
        self._slots = [_Slot(name, self._create(name)) for name in names]
        self._prepare_due()

    @property
    def capacity(self) -> int:
        """Candidates that keep every ready actor busy; before any is ready, one for each."""
        return PLACES * self.num_alive or len(self._slots)

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
        if ray.is_initialized():
            for slot in slots:
                ray.kill(slot.actor)
        self._queue.clear()
        self._flights.clear()
        self._preparing.clear()
        self._payload.clear()

    def _create(self, name: str) -> Any:
        return self._actor_class.remote(name)

    def _prepare_due(self) -> None:
        now = time.monotonic()
        for slot in self._slots:
            if not slot.is_ready and not slot.is_preparing and slot.prepare_at <= now:
                slot.is_preparing = True
                ref = slot.actor.prepare.remote(self._make_score, self._payload)
                self._preparing[ref] = slot

    def _dispatch(self) -> None:
        """Sends queued candidates to free places, the least loaded actor first.

        A candidate that failed somewhere waits for an actor that has not tried it, as long as
        there is a ready one, and that actor gets nothing new meanwhile.
        """
        ready = [slot for slot in self._slots if slot.is_ready]
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
        self._prepare_due()
        self._dispatch()
        finished = self._wait(timeout)
        measurements: list[Measurement] = []
        for ref in finished:
            outcome = _outcome(ref)
            if ref in self._preparing:
                self._note_prepared(self._preparing.pop(ref), outcome)
                continue
            flight = self._flights.pop(ref)
            flight.slot.num_free += flight.num_places
            if isinstance(outcome, Measurement):
                measurements.append(outcome)
            else:
                measurements += self._fail(flight, outcome)
        self._check_started()
        if finished:
            self._prepare_due()
            self._dispatch()
        return measurements

    def _wait(self, timeout: float) -> list[ray.ObjectRef]:
        refs = [*self._flights, *self._preparing]
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
            reason = f"scoring raised {_describe(error)}"
        else:
            reason = f"lost with {slot.name}: {_describe(error)}"
            is_preempted = isinstance(error, RayActorError) and error.preempted
            is_counted = not (is_preempted or isinstance(error, NotPreparedError))
            slot.is_ready = False
        if is_counted:
            work.tried.add(slot.name)
            if work.attempt >= self._max_attempts:
                logger.warning("candidate %d is given up: %s", work.candidate.index, reason)
                return [_failed(work, slot.name, reason)]
            work.attempt += 1
        logger.debug("candidate %d is tried again: %s", work.candidate.index, reason)
        self._queue.appendleft(work)
        return []

    def _note_prepared(self, slot: _Slot, outcome: Any) -> None:
        slot.is_preparing = False
        if not isinstance(outcome, Exception):
            slot.is_ready, slot.num_crashes, slot.start_error = True, 0, ""
            self._was_ready = True
            return
        now = time.monotonic()
        slot.prepare_at = now + RETRY_DELAY_S
        is_lost = isinstance(outcome, RayActorError)
        slot.num_crashes += is_lost
        # Once a score function was built, losses are the nodes' fault: wait for other nodes.
        if not is_lost or (slot.num_crashes >= MAX_START_CRASHES and not self._was_ready):
            slot.start_error = _describe(outcome)
            self._first_error_at = min(self._first_error_at, now)
        if isinstance(outcome, ActorDiedError):  # Ray may not restart it
            ray.kill(slot.actor)
            slot.actor = self._create(slot.name)

    def _check_started(self) -> None:
        """Notices when waiting for actors is in vain, or may be."""
        now = time.monotonic()
        if self.num_alive:
            self._none_ready_since, self._first_error_at = now, math.inf
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


def _outcome(ref: ray.ObjectRef) -> Any:
    """The value of a finished task, or the error in its place."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def _describe(error: Exception) -> str:
    """One line of what happened, without Ray's own frames."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        lines = str(cause).strip().splitlines()
        return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    if isinstance(error, RayActorError):
        return f"its process died or its node went away ({type(error).__name__})"
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _failed(work: _Work, evaluator: str, reason: str) -> Measurement:
    return Measurement(
        index=work.candidate.index,
        top1=0.0,
        top5=0.0,
        loss=0.0,
        images=0,
        seconds=0.0,
        status="failed",
        error=reason,
        evaluator=evaluator,
        node="",
        attempt=work.attempt,
        finished_at=time.time(),
    )
