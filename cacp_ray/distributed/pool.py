"""Evaluator actors on a Ray cluster whose nodes and processes may come and go.

The pool, not Ray, submits a candidate again whose evaluator was lost. Ray would retry a candidate
that crashes its process for ever, and on an actor that may never come back. Scoring is pure, so
retries are safe.
"""

import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ray import ObjectRef
from ray.exceptions import RayActorError, RayTaskError
from ray.util.metrics import Counter, Gauge

from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.evaluator import NotPreparedError
from cacp_ray.distributed.fleet import PLACES, RETRY_DELAY_S, WATCH_S, Fleet, Slot
from cacp_ray.distributed.nodes import Kind
from cacp_ray.distributed.tasks import describe
from cacp_ray.evaluation.measurement import FAILED, Candidate, Measurement

logger = logging.getLogger(__name__)

HANG_S = 300.0
FIRST_HANG_S = 3600.0  # while no actor of its kind has answered; doubles each time, up to
MOST_PATIENCE = 8  # times as much
HANG_FACTOR = 20.0  # of the slowest measurement so far, image by image
LOSSES_AN_ATTEMPT = 3


@dataclass(eq=False)
class Work:
    """A candidate that has no measurement yet.

    A candidate that failed before travels alone: if it crashes its process again, no other is lost.
    """

    candidate: Candidate
    attempt: int = 1  # number of the current try, from 1
    actor: Any = None  # that the current try was sent to
    node: str = ""  # id of its node
    tried: set[str] = field(default_factory=set)  # names of the evaluators on which it failed
    failed_on: list[str] = field(default_factory=list)  # node of each failure that counts

    @property
    def num_places(self) -> int:
        """Places that it takes on an actor."""
        return PLACES if self.tried else 1


class RayEvaluatorPool:
    """Scores on Ray actors, each candidate once, in any order; implements the Evaluator port."""

    def __init__(
        self,
        actors: RayActors,
        *,
        num_evaluators: int,  # actors to ask for, whether there is room for them yet or not
        cpus_per_evaluator: float,  # reserved by an actor; also its threads, at least 1
        num_gpu_evaluators: int = 0,  # further actors, with a share of a GPU
        gpus_per_evaluator: float = 0.0,  # share of a GPU for those, in (0, 1]; 0 without them
        max_attempts: int = 3,  # tries of one candidate before it is given up as failed
        most: int | None = None,  # actors at most, where the pool follows the cluster
    ) -> None:
        """Starts the actors and returns at once.

        A try that was lost with its node does not count, up to three times `max_attempts`, nor does
        one lost to an announced preemption. A pool that follows the cluster adds actors when nodes
        join, and removes those that have found no room for a minute. Where some have shares of
        GPUs, plain actors are added for nodes without a GPU only.
        """
        counts = {Kind(cpus_per_evaluator): num_evaluators}
        if gpus_per_evaluator:  # first, or the others would take their CPUs
            counts = {Kind(cpus_per_evaluator, gpus_per_evaluator): num_gpu_evaluators, **counts}
        self._actors = actors
        self._fleet = Fleet(actors, counts, most)
        self._max_attempts = max_attempts
        self._metrics = _Metrics()
        self._show_at = actors.now()
        self._queue: deque[Work] = deque()
        self._flights: dict[ObjectRef, tuple[Slot, Work]] = {}
        self._slowest: dict[Kind, float] = {}  # seconds an image, of one measurement
        self._first_patience = FIRST_HANG_S
        self._most_images = 0  # in one measurement

    @property
    def capacity(self) -> int:
        """Candidates that keep every ready actor busy; before any is, one for each with room."""
        return PLACES * self.num_alive or min(self._fleet.first_capacity, len(self._fleet.slots))

    @property
    def num_alive(self) -> int:
        """Actors that were ready to score at the last `results`."""
        return self._fleet.num_alive

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate, and sends it at once if an actor has a free place."""
        self._queue.append(Work(candidate))
        self._dispatch()

    def results(self, timeout: float) -> list[Measurement]:
        """Returns all finished measurements; waits up to `timeout` seconds for the first.

        Returns at once when no candidate is outstanding.

        Raises:
            EvaluationError: No actor can be prepared (`make_score` fails).
        """
        deadline = self._actors.now() + timeout
        measurements = self._poll(0.0)
        while not measurements and (self._queue or self._flights):
            if (remaining := deadline - self._actors.now()) <= 0:
                break
            measurements = self._poll(remaining)
        return measurements

    def close(self) -> None:
        """Ends the actors; outstanding candidates are dropped."""
        self._metrics.show(waiting=0, scoring=0, alive=0)
        self._fleet.close()
        self._queue.clear()
        self._flights.clear()

    def _dispatch(self) -> None:
        """Sends queued candidates to free places, the least loaded actor first.

        A candidate that failed somewhere waits for an actor that has not tried it, as long as
        there is a ready one. Until then that actor gets nothing new.
        """
        ready = [slot for slot in self._fleet.slots if slot.is_ready and not slot.is_draining]
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
            if slot.num_free == PLACES:
                slot.answered_at = self._actors.now()
            slot.num_free -= work.num_places
            work.actor, work.node = slot.actor, slot.node
            self._flights[self._actors.score(slot.actor, work.candidate, work.attempt)] = slot, work
        self._queue.extendleft(reversed(waiting))

    def _poll(self, timeout: float) -> list[Measurement]:
        """Waits once, at most `timeout` seconds, and takes everything that is ready."""
        self._show()
        self._fleet.watch_nodes()
        self._fleet.start_due()
        self._dispatch()
        finished = self._wait(timeout)
        measurements: list[Measurement] = []
        for ref in finished:
            outcome = self._actors.outcome(ref)
            if ref in self._fleet.starting:
                self._fleet.take_answer(ref, outcome)
                continue
            slot, work = self._flights.pop(ref)
            slot.num_free += work.num_places
            slot.answered_at = self._actors.now()
            if isinstance(outcome, Measurement):
                self._note_speed(slot.kind, outcome)
                if outcome.error:
                    logger.warning("%s: %s", slot.name, outcome.error)
                measurements.append(outcome)
            else:
                measurements += self._fail(slot, work, outcome)
        self._metrics.count(measurements)
        self._replace_hung()
        self._fleet.check()
        if finished:
            self._fleet.start_due()
            self._dispatch()
        return measurements

    def _wait(self, timeout: float) -> list[ObjectRef]:
        refs = [*self._flights, *self._fleet.starting]
        if not refs:
            # Every actor waits to be tried again.
            self._actors.sleep(min(timeout, RETRY_DELAY_S / 4))
            return []
        return self._actors.wait(refs, min(timeout, RETRY_DELAY_S))

    def _fail(self, slot: Slot, work: Work, error: Exception) -> list[Measurement]:
        """Queues the candidate for another actor, or gives it up."""
        is_counted = True
        if isinstance(error, RayTaskError) and not isinstance(error, NotPreparedError):
            reason = f"scoring raised {describe(error)}"
        else:
            reason = f"lost with {slot.name}: {describe(error)}"
            is_preempted = isinstance(error, RayActorError) and error.preempted
            is_counted = not (is_preempted or isinstance(error, NotPreparedError))
            if slot.actor is work.actor:  # not replaced since
                slot.lose(self._actors.now())
        if is_counted:
            work.tried.add(slot.name)
            work.failed_on.append(work.node)
            if self._is_given_up(work):
                logger.warning("candidate %d is given up: %s", work.candidate.index, reason)
                return [_failed_measurement(work, slot.name, reason)]
            work.attempt += 1
        logger.debug("candidate %d is tried again: %s", work.candidate.index, reason)
        self._queue.appendleft(work)
        return []

    def _is_given_up(self, work: Work) -> bool:
        """Whether the candidate failed too often, on nodes that are still there or on any."""
        if len(work.failed_on) < self._max_attempts:
            return False
        present = self._actors.nodes().cpus  # the node lost last may still be among them
        is_its_fault = sum(node in present for node in work.failed_on) >= self._max_attempts
        return is_its_fault or len(work.failed_on) >= LOSSES_AN_ATTEMPT * self._max_attempts

    def _note_speed(self, kind: Kind, measurement: Measurement) -> None:
        if measurement.status == "failed":
            return
        images = measurement.images or 1  # a task of the user's own counts none: all is one
        an_image = measurement.seconds / images
        self._slowest[kind] = max(self._slowest.get(kind, 0.0), an_image)
        self._most_images = max(self._most_images, images)

    def _replace_hung(self) -> None:
        """Replaces actors that have not answered for very long; others get their candidates."""
        images: dict[Slot, int] = {}
        for slot, work in self._flights.values():
            most = max(self._most_images, work.candidate.images or 0)
            images[slot] = max(most, images.get(slot, 0))
        first_patience = self._first_patience
        for slot, most in images.items():
            slowest = self._slowest.get(slot.kind)
            patience = first_patience
            if slowest is not None:
                patience = max(HANG_S, HANG_FACTOR * slowest * most)
            if slot.is_ready and self._actors.now() - slot.answered_at > patience:
                logger.warning(
                    "%s has not answered for %.0f s: it is replaced", slot.name, patience
                )
                self._fleet.replace(slot)
                if slowest is None:  # a measurement may simply take that long
                    self._first_patience = min(2 * first_patience, MOST_PATIENCE * FIRST_HANG_S)

    def _show(self) -> None:
        now = self._actors.now()
        if now >= self._show_at:
            self._show_at = now + WATCH_S
            waiting, scoring = len(self._queue), len(self._flights)
            self._metrics.show(waiting=waiting, scoring=scoring, alive=self.num_alive)


class _Metrics:
    """What the pool tells Ray, for its dashboard and for Prometheus.

    Ray exports them as `ray_cacp_...` where the dashboard's packages (`ray[default]`) are
    installed; elsewhere they go nowhere, at no cost. `rate(ray_cacp_measurements_total[1m])` is
    evaluations per second.
    """

    def __init__(self) -> None:
        self._measurements = Counter("cacp_measurements", "Candidates that were scored")
        self._failed = Counter("cacp_failed_measurements", "Candidates that were given up")
        self._waiting = Gauge("cacp_candidates_waiting", "Candidates that wait for an evaluator")
        self._scoring = Gauge("cacp_candidates_scoring", "Candidates that evaluators hold")
        self._alive = Gauge("cacp_evaluators_alive", "Evaluators that are ready to score")

    def count(self, measurements: Sequence[Measurement]) -> None:
        for measurement in measurements:
            # A candidate that fell behind in a race was scored as well.
            (self._failed if measurement.status == "failed" else self._measurements).inc()

    def show(self, *, waiting: int, scoring: int, alive: int) -> None:
        self._waiting.set(waiting)
        self._scoring.set(scoring)
        self._alive.set(alive)


def _failed_measurement(work: Work, evaluator: str, reason: str) -> Measurement:
    return Measurement(
        index=work.candidate.index,
        score=FAILED,
        seconds=0.0,
        status="failed",
        error=reason,
        evaluator=evaluator,
        node="",
        attempt=work.attempt,
        finished_at=time.time(),
    )
