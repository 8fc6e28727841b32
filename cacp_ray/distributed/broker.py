"""One evaluator pool and one cache for many searches on a cluster.

The broker is an actor that owns the pool. Every search talks to it through a `BrokeredEvaluator`,
an Evaluator like any other. Searches take turns, so that each gets its share whatever the others
ask, and a candidate that several of them want is scored once.
"""

import dataclasses
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.cache import Key, MeasurementCache
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

PUMP_SECONDS = 0.05
CALL_SECONDS = 5.0  # of one waiting call of a client
MAX_CALLS = 256  # at once; each client has one


@dataclass(frozen=True)
class BrokerStatus:
    """How candidates were answered so far, and by whom they can be.

    Attributes:
        scored: Answers of an evaluator.
        cached: Answers of the cache.
        joined: Answers that came with another search's score of the same candidate.
        capacity: Candidates that keep every evaluator busy.
        num_alive: Evaluators ready to score.
    """

    scored: int = 0
    cached: int = 0
    joined: int = 0
    capacity: int = 1
    num_alive: int = 0


@dataclass(eq=False)
class _Client:
    """A search: what it has asked, and what it has not fetched yet.

    `counts` are its candidates that were answered or sent to the pool, and those that needed no
    evaluator.
    """

    counts: list[int]
    queue: deque[Candidate] = field(default_factory=deque)
    inbox: list[Measurement] = field(default_factory=list)


@dataclass(eq=False)
class _Flight:
    """A candidate at the pool, and which searches wait for it under which index."""

    candidate: Candidate
    waiting: list[tuple[_Client, int]]


class Broker:
    """Runs as an actor of many threads, one of which alone touches the pool."""

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        *,
        cache_folder: Path,
        cache_key: str,
        images: int,
        **pool_options: Any,
    ) -> None:
        """Starts the pool and returns.

        Args:
            make_score: As of `RayEvaluatorPool`.
            payload: As of `RayEvaluatorPool`.
            cache_folder: Of measurements, read and added to.
            cache_key: See `cacp_ray.evaluation.cache.key_of_scores`.
            images: That score a candidate which does not say how many.
            pool_options: Of `RayEvaluatorPool`.
        """
        self._pool = RayEvaluatorPool(make_score, payload, **pool_options)
        self._cache = MeasurementCache(cache_folder, cache_key)
        self._images = images
        self._changed = threading.Condition()
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # whose turn it is comes first
        self._counts: dict[str, list[int]] = {}  # of all searches there were
        self._flights: dict[int, _Flight] = {}
        self._in_flight: dict[Key, _Flight] = {}
        self._next_index = 0
        self._status = BrokerStatus()
        self._error = ""
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def open(self, client: str) -> None:
        """Begins a search, or begins it anew: what it had asked before is forgotten."""
        with self._changed:
            self._clients[client] = _Client(self._counts.setdefault(client, [0, 0]))

    def submit(self, client: str, candidate: Candidate) -> None:
        """Answers a candidate of an open search from what is known, or queues it."""
        with self._changed:
            mine = self._clients.get(client)
            if mine is not None and not self._answer(mine, candidate):
                mine.queue.append(candidate)
                self._changed.notify_all()

    def collect(self, client: str, timeout: float) -> list[Measurement]:
        """What was measured for a search; waits up to `timeout` seconds for a first one.

        Raises:
            EvaluationError: The pool cannot score.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while client in self._clients:
                mine = self._clients[client]
                if mine.inbox:
                    found, mine.inbox = mine.inbox, []
                    return found
                if self._error:
                    raise EvaluationError(self._error)
                if time.monotonic() >= deadline:
                    break
                self._changed.wait(deadline - time.monotonic())
        return []

    def close(self, client: str) -> None:
        """Ends a search: what it had queued is not scored."""
        with self._changed:
            self._clients.pop(client, None)
            self._changed.notify_all()

    def status(self) -> BrokerStatus:
        """As of now."""
        with self._changed:
            return self._status

    def counts(self) -> dict[str, tuple[int, int]]:
        """By search: candidates asked for, and those that no evaluator had to score for it."""
        with self._changed:
            return {client: (asked, known) for client, (asked, known) in self._counts.items()}

    def _pump(self) -> None:
        try:
            while True:
                with self._changed:
                    chosen = self._take_turns(self._pool.capacity - len(self._flights))
                    if not self._flights:
                        self._changed.wait(PUMP_SECONDS)
                for candidate in chosen:
                    self._pool.submit(candidate)
                found = self._pool.results(PUMP_SECONDS)
                with self._changed:
                    for measurement in found:
                        self._deliver(measurement)
                    self._note(capacity=self._pool.capacity, num_alive=self._pool.num_alive)
        except Exception as error:  # nothing more will be scored: every search has to know
            with self._changed:
                self._error = str(error) or type(error).__name__
                self._changed.notify_all()

    def _take_turns(self, room: int) -> list[Candidate]:
        """At most `room` candidates for the pool, one of every search in turn."""
        chosen: list[Candidate] = []
        num_idle = 0
        while len(chosen) < room and num_idle < len(self._clients):
            name, client = self._clients.popitem(last=False)
            self._clients[name] = client
            num_idle += 1
            while client.queue:
                num_idle = 0
                candidate = client.queue.popleft()
                if not self._answer(client, candidate):
                    chosen.append(self._send(client, candidate))
                    break
        return chosen

    def _answer(self, client: _Client, candidate: Candidate) -> bool:
        """Whether it is known already, or will be when another search's candidate is scored."""
        images = candidate.images or self._images
        known = self._cache.get(candidate, images)
        if known is not None:
            client.inbox.append(dataclasses.replace(known, seconds=0.0))
            self._count(client, known=1)
            self._note(cached=self._status.cached + 1)
            self._changed.notify_all()
            return True
        flight = self._in_flight.get((candidate.subnet, images))
        if flight is None:
            return False
        flight.waiting.append((client, candidate.index))
        self._count(client, known=1)
        self._note(joined=self._status.joined + 1)
        return True

    def _send(self, client: _Client, candidate: Candidate) -> Candidate:
        """As the pool gets it."""
        # To the end, whatever it races against: others may want it too.
        sent = dataclasses.replace(candidate, index=self._next_index, best="")
        self._next_index += 1
        self._count(client, known=0)
        flight = _Flight(sent, [(client, candidate.index)])
        key = candidate.subnet, candidate.images or self._images
        self._flights[sent.index] = self._in_flight[key] = flight
        self._note(scored=self._status.scored + 1)
        return sent

    def _deliver(self, measurement: Measurement) -> None:
        flight = self._flights.pop(measurement.index, None)
        if flight is None:
            return
        candidate = flight.candidate
        self._in_flight.pop((candidate.subnet, candidate.images or self._images))
        self._cache.add(candidate, measurement)
        for client, index in flight.waiting:
            client.inbox.append(dataclasses.replace(measurement, index=index))
        self._changed.notify_all()

    def _count(self, client: _Client, *, known: int) -> None:
        client.counts[0] += 1
        client.counts[1] += known

    def _note(self, **changes: int) -> None:
        self._status = dataclasses.replace(self._status, **changes)


def start_broker(*arguments: Any, **options: Any) -> Any:
    """A handle of a new broker on this node, where its cache folder is; arguments as its own.

    It ends with this driver, or by `ray.kill`, and its evaluators with it.
    """
    node = ray.get_runtime_context().get_node_id()
    actor_class = ray.remote(Broker).options(
        name=f"cacp-ray-broker-{uuid4().hex[:8]}",  # for people: its users have the handle
        num_cpus=0,
        max_concurrency=MAX_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return actor_class.remote(*arguments, **options)


class BrokeredEvaluator:
    """A search's share of the broker's evaluators; implements the Evaluator port."""

    def __init__(self, broker: Any, client: str) -> None:
        """Begins a search under a name of its own.

        Args:
            broker: Handle of `start_broker`.
            client: Name of the search; an earlier one of that name is forgotten.
        """
        self._broker, self._client = broker, client
        ray.get(broker.open.remote(client))

    @property
    def capacity(self) -> int:
        """That of the pool."""
        return self._status.capacity

    @property
    def num_alive(self) -> int:
        """That of the pool."""
        return self._status.num_alive

    @property
    def _status(self) -> BrokerStatus:
        return cast(BrokerStatus, ray.get(self._broker.status.remote()))

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate."""
        # Waited for: an actor of many threads does not keep the order of calls.
        ray.get(self._broker.submit.remote(self._client, candidate))

    def results(self, timeout: float) -> list[Measurement]:
        """What was measured; waits up to `timeout` seconds for a first one.

        Raises:
            EvaluationError: The pool cannot score, or the broker is gone.
        """
        try:
            wait = min(timeout, CALL_SECONDS)
            return cast(Any, ray.get(self._broker.collect.remote(self._client, wait)))
        except RayTaskError as error:
            raise EvaluationError(str(error.cause)) from error
        except RayActorError as error:
            raise EvaluationError("the broker of the evaluators has died") from error

    def close(self) -> None:
        """Drops what is queued."""
        ray.get(self._broker.close.remote(self._client))
