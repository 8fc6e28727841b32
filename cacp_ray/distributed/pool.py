"""Evaluator actors on a Ray cluster whose nodes and processes may come and go.

The pool, not Ray, resubmits a candidate whose evaluator was lost: Ray would retry one that crashes
its process for ever, and on an actor that may never come back. Scoring is pure, so that is safe.
"""

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cacp_ray.distributed.evaluator import NotPreparedError
from cacp_ray.distributed.fleet import RETRY_DELAY_S, WATCH_S, Fleet
from cacp_ray.distributed.metrics import PoolMetrics
from cacp_ray.distributed.nodes import read_nodes
from cacp_ray.distributed.outcomes import as_failed, describe, get_outcome
from cacp_ray.distributed.slots import PLACES, Flight, Kind, Slot, Work
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

logger = logging.getLogger(__name__)

HANG_S = 300.0
FIRST_HANG_S = 3600.0  # while nothing is known of a kind of actor; doubles each time
HANG_FACTOR = 20.0  # of the slowest measurement so far, image by image
LOSSES_AN_ATTEMPT = 3


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
        most: int | None = None,
    ) -> None:
        """Starts the actors and returns at once.

        Args:
            make_score: Called once in every actor's process as `make_score(**payload)`. It must be
                importable there.
            payload: What scoring needs. Each value is stored once, unless it is the reference of
                one that is stored; an actor reads numpy arrays, also inside containers, without a
                copy and read-only.
            num_evaluators: Actors to ask for, whether there is room for them yet or not.
            cpus_per_evaluator: CPUs an actor reserves; also its threads, at least 1.
            num_gpu_evaluators: Actors with a share of a GPU to ask for beside them;
                `make_score(**payload, gpu=share)` is called in those.
            gpus_per_evaluator: That share.
            max_attempts: Tries of one candidate before it is given up as failed. One that was lost
                with its node does not count, up to three times as many, nor does one lost to an
                announced preemption.
            most: Ask for as many as there is room for instead, up to this number: these at first,
                more when nodes join, and none that has found no room for a minute. Where actors
                have shares of GPUs, those without are asked for nodes that have no GPU.
        """
        self._fleet = Fleet(
            make_score,
            payload,
            num_evaluators=num_evaluators,
            cpus_per_evaluator=cpus_per_evaluator,
            num_gpu_evaluators=num_gpu_evaluators,
            gpus_per_evaluator=gpus_per_evaluator,
            most=most,
        )
        self._max_attempts = max_attempts
        self._metrics = PoolMetrics()
        self._show_at = time.monotonic()
        self._queue: deque[Work] = deque()
        self._flights: dict[ray.ObjectRef, Flight] = {}
        self._slowest: dict[Kind, float] = {}  # seconds of an image, in a measurement
        self._first_patience = FIRST_HANG_S
        self._most_images = 0  # of a measurement

    @property
    def capacity(self) -> int:
        """Candidates that keep every ready actor busy; before any is, one for each with room."""
        return PLACES * self.num_alive or min(self._fleet.first_capacity, len(self._fleet.slots))

    @property
    def num_alive(self) -> int:
        """Actors ready to score, as of the last `results`."""
        return self._fleet.num_alive

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
        self._metrics.show(waiting=0, scoring=0, alive=0)
        self._fleet.close()
        self._queue.clear()
        self._flights.clear()

    def _dispatch(self) -> None:
        """Sends queued candidates to free places, the least loaded actor first.

        A candidate that failed somewhere waits for an actor that has not tried it, as long as
        there is a ready one, and that actor gets nothing new meanwhile.
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
                slot.answered_at = time.monotonic()
            slot.num_free -= work.num_places
            ref = slot.actor.score.remote(work.candidate, work.attempt)
            self._flights[ref] = Flight(slot, slot.node, work, work.num_places)
        self._queue.extendleft(reversed(waiting))

    def _poll(self, timeout: float) -> list[Measurement]:
        """One wait of at most `timeout` seconds, then everything that is ready."""
        self._show()
        self._fleet.watch_nodes()
        self._fleet.start_due()
        self._dispatch()
        finished = self._wait(timeout)
        measurements: list[Measurement] = []
        for ref in finished:
            outcome = get_outcome(ref)
            if ref in self._fleet.starting:
                self._fleet.take_answer(ref, outcome)
                continue
            flight = self._flights.pop(ref)
            flight.slot.num_free += flight.num_places
            flight.slot.answered_at = time.monotonic()
            if isinstance(outcome, Measurement):
                self._note_speed(flight.slot.kind, outcome)
                if outcome.error:
                    logger.warning("%s: %s", flight.slot.name, outcome.error)
                measurements.append(outcome)
            else:
                measurements += self._fail(flight, outcome)
        self._metrics.count(measurements)
        self._replace_hung()
        self._fleet.check()
        if finished:
            self._fleet.start_due()
            self._dispatch()
        return measurements

    def _wait(self, timeout: float) -> list[ray.ObjectRef]:
        refs = [*self._flights, *self._fleet.starting]
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
            work.failed_on.append(flight.node)
            if self._is_given_up(work):
                logger.warning("candidate %d is given up: %s", work.candidate.index, reason)
                return [as_failed(work.candidate.index, work.attempt, slot.name, reason)]
            work.attempt += 1
        logger.debug("candidate %d is tried again: %s", work.candidate.index, reason)
        self._queue.appendleft(work)
        return []

    def _is_given_up(self, work: Work) -> bool:
        """Whether it failed too often, on nodes that are still there or on any."""
        if len(work.failed_on) < self._max_attempts:
            return False
        there = read_nodes().cpus  # a lost node may not be known as lost yet; others are
        is_its_fault = sum(node in there for node in work.failed_on) >= self._max_attempts
        return is_its_fault or len(work.failed_on) >= LOSSES_AN_ATTEMPT * self._max_attempts

    def _note_speed(self, kind: Kind, measurement: Measurement) -> None:
        if measurement.images:
            an_image = measurement.seconds / measurement.images
            self._slowest[kind] = max(self._slowest.get(kind, 0.0), an_image)
            self._most_images = max(self._most_images, measurement.images)

    def _replace_hung(self) -> None:
        """Ends actors that have not answered for very long; their candidates go to others."""
        images: dict[Slot, int] = {}
        for flight in self._flights.values():
            most = max(self._most_images, flight.work.candidate.images or 0)
            images[flight.slot] = max(most, images.get(flight.slot, 0))
        first_patience = self._first_patience
        for slot, most in images.items():
            slowest = self._slowest.get(slot.kind)
            patience = first_patience
            if slowest is not None:
                patience = max(HANG_S, HANG_FACTOR * slowest * most)
            if slot.is_ready and time.monotonic() - slot.answered_at > patience:
                logger.warning(
                    "%s has not answered for %.0f s: it is replaced", slot.name, patience
                )
                self._fleet.replace(slot)
                if slowest is None:  # perhaps it only takes that long
                    self._first_patience = 2 * first_patience

    def _show(self) -> None:
        now = time.monotonic()
        if now >= self._show_at:
            self._show_at = now + WATCH_S
            waiting, scoring = len(self._queue), len(self._flights)
            self._metrics.show(waiting=waiting, scoring=scoring, alive=self.num_alive)
