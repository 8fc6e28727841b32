"""One evaluator pool and one cache for many searches on a cluster.

The broker is an actor that owns the pool. Every search talks to it through a `BrokeredEvaluator`,
an Evaluator like any other. Searches take turns, so each gets its share whatever the others ask. A
candidate that several searches want is scored once.
"""

import dataclasses
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.cache import Key, MeasurementCache
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.io.labels import ANY, Selector

PUMP_SECONDS = 0.05
CALL_SECONDS = 5.0  # the longest that one call of a client waits
MAX_CALLS = 256  # at once; each client makes one at a time


@dataclass(frozen=True)
class BrokerStatus:
    """How candidates were answered so far, and the state of the pool."""

    scored: int = 0  # candidates that an evaluator answered
    cached: int = 0  # candidates that the cache answered
    joined: int = 0  # candidates answered by the score that another search was waiting for
    capacity: int = 1  # candidates that keep every evaluator busy
    num_alive: int = 0  # evaluators ready to score


@dataclass(eq=False)
class _Client:
    """A search, with the candidates it waits for and the measurements it has not fetched."""

    counts: list[int]  # candidates answered or sent to the pool; those that needed no evaluator
    queue: deque[Candidate] = field(default_factory=deque)
    inbox: list[Measurement] = field(default_factory=list)


@dataclass(eq=False)
class _Flight:
    """A candidate at the pool, and the searches that wait for it, each with its own index."""

    candidate: Candidate
    waiting: list[tuple[_Client, int]]


class Broker:
    """The actor; of its many threads, only the pump touches the pool."""

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        *,
        cache_folder: Path,
        cache_key: str,  # see `cacp_ray.evaluation.cache.key_of_scores`
        images: int,  # scored where a candidate does not say how many
        labels: Selector = ANY,
        **pool_options: Any,
    ) -> None:
        """Starts the pool and returns; `RayActors` and `RayEvaluatorPool` explain the arguments."""
        self._pool = RayEvaluatorPool(RayActors(make_score, payload, labels), **pool_options)
        self._cache = MeasurementCache(cache_folder, cache_key)
        self._images = images
        self._changed = threading.Condition()
        self._clients: OrderedDict[str, _Client] = OrderedDict()  # the next in turn comes first
        self._counts: dict[str, list[int]] = {}  # by search, ended ones included
        self._flights: dict[int, _Flight] = {}
        self._in_flight: dict[Key, _Flight] = {}
        self._next_index = 0
        self._status = BrokerStatus()
        self._error = ""
        self._thread = threading.Thread(target=self._pump, daemon=True)
        self._thread.start()

    def open(self, client: str) -> None:
        """Begins a search; what an earlier one of that name had asked is forgotten."""
        with self._changed:
            self._clients[client] = _Client(self._counts.setdefault(client, [0, 0]))

    def submit(self, client: str, candidate: Candidate) -> None:
        """Answers a candidate of an open search from known measurements, or queues it."""
        with self._changed:
            mine = self._clients.get(client)
            if mine is not None and not self._answer(mine, candidate):
                mine.queue.append(candidate)
                self._changed.notify_all()

    def collect(self, client: str, timeout: float) -> list[Measurement]:
        """Returns what was measured for a search; waits up to `timeout` seconds for the first.

        Raises:
            EvaluationError: The pool cannot score.
        """

        def has_answer() -> bool:
            mine = self._clients.get(client)
            return mine is None or bool(mine.inbox or self._error)

        with self._changed:
            self._changed.wait_for(has_answer, timeout)
            mine = self._clients.get(client)
            if mine is None:
                return []
            if self._error and not mine.inbox:
                raise EvaluationError(self._error)
            measurements, mine.inbox = mine.inbox, []
            return measurements

    def close(self, client: str) -> None:
        """Ends a search; its queued candidates are not scored."""
        with self._changed:
            self._clients.pop(client, None)
            self._changed.notify_all()

    def status(self) -> BrokerStatus:
        """How candidates were answered so far."""
        with self._changed:
            return self._status

    def counts(self) -> dict[str, tuple[int, int]]:
        """Candidates that each search asked for, and those that needed no evaluator."""
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
                measurements = self._pool.results(PUMP_SECONDS)
                with self._changed:
                    for measurement in measurements:
                        self._deliver(measurement)
                    self._note(capacity=self._pool.capacity, num_alive=self._pool.num_alive)
        except Exception as error:  # nothing more will be scored, so every search must learn of it
            with self._changed:
                self._error = str(error) or type(error).__name__
                self._changed.notify_all()

    def _take_turns(self, room: int) -> list[Candidate]:
        """Takes at most `room` candidates for the pool, one of every search in turn."""
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
        """Answers from the cache, or joins a search that waits for it; False if neither can be."""
        images = candidate.images or self._images
        known = self._cache.get(candidate, images)
        if known is not None:
            client.inbox.append(known)
            self._count(client, known=1)
            self._note(cached=self._status.cached + 1)
            self._changed.notify_all()
            return True
        flight = self._in_flight.get((candidate.key, images))
        if flight is None:
            return False
        flight.waiting.append((client, candidate.index))
        self._count(client, known=1)
        self._note(joined=self._status.joined + 1)
        return True

    def _send(self, client: _Client, candidate: Candidate) -> Candidate:
        """Notes a candidate as sent; returns it as the pool gets it."""
        # It is scored to the end, without an opponent: other searches may want it too.
        sent = dataclasses.replace(candidate, index=self._next_index, opponent="")
        self._next_index += 1
        self._count(client, known=0)
        flight = _Flight(sent, [(client, candidate.index)])
        key = candidate.key, candidate.images or self._images
        self._flights[sent.index] = self._in_flight[key] = flight
        self._note(scored=self._status.scored + 1)
        return sent

    def _deliver(self, measurement: Measurement) -> None:
        flight = self._flights.pop(measurement.index)
        candidate = flight.candidate
        self._in_flight.pop((candidate.key, candidate.images or self._images))
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
    """Starts a broker on this node, where its cache folder is; returns its handle.

    The broker and its evaluators end with this driver, or by `stop_broker`. `Broker` explains the
    arguments.
    """
    node = ray.get_runtime_context().get_node_id()
    actor_class = ray.remote(Broker).options(
        name=f"cacp-ray-broker-{uuid4().hex[:8]}",  # for people; searches have the handle
        num_cpus=0,
        max_concurrency=MAX_CALLS,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False),
    )
    return actor_class.remote(*arguments, **options)


def read_answers(broker: Any) -> tuple[BrokerStatus, dict[str, tuple[int, int]]]:
    """A broker's `status` and `counts`."""
    return cast(Any, ray.get([broker.status.remote(), broker.counts.remote()]))


def stop_broker(broker: Any) -> None:
    """Ends a broker and its evaluators."""
    ray.kill(broker)


class BrokeredEvaluator:
    """A search's share of the broker's evaluators; implements the Evaluator port."""

    def __init__(self, broker: Any, client: str) -> None:
        """Begins the search `client`; an earlier search of that name is forgotten."""
        self._broker, self._client = broker, client
        ray.get(broker.open.remote(client))

    @property
    def capacity(self) -> int:
        """Candidates that keep every evaluator of the broker busy."""
        return self._status.capacity

    @property
    def num_alive(self) -> int:
        """Evaluators of the broker that are ready to score."""
        return self._status.num_alive

    @property
    def _status(self) -> BrokerStatus:
        return cast(BrokerStatus, ray.get(self._broker.status.remote()))

    def submit(self, candidate: Candidate) -> None:
        """Queues a candidate."""
        # Wait: an actor with many threads does not keep the order of calls.
        ray.get(self._broker.submit.remote(self._client, candidate))

    def results(self, timeout: float) -> list[Measurement]:
        """Returns what was measured; waits up to `timeout` seconds for the first.

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
        """Ends the search and drops its queue."""
        ray.get(self._broker.close.remote(self._client))
