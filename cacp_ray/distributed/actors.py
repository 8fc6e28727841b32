"""The calls that a pool makes to Ray: actors started, asked and ended, the cluster's nodes, time.

None of them waits but `wait` and `sleep`. Tests hand a pool a cluster that is made up, with the
same methods and a clock of its own, so that what a pool does about losses, hangs and joining nodes
is tried without Ray and without waiting.
"""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from cacp_ray.distributed.evaluator import RayEvaluator
from cacp_ray.distributed.nodes import Kind, Nodes, read_free, read_nodes
from cacp_ray.distributed.tasks import get_outcome, store
from cacp_ray.evaluation.measurement import Candidate, ScoreFunction
from cacp_ray.io.labels import ANY, Selector

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class RayActors:
    """Evaluator actors on the connected cluster, whose process calls `make_score(**payload)` once.

    Every process must be able to import `make_score`. Each value of the payload is stored once,
    unless it is a reference in Ray's store. Actors read numpy arrays, also inside containers,
    without a copy and read-only. An actor with a share of a GPU is told it as `gpu=share`. All run
    on nodes with these labels, and no other nodes are seen.
    """

    def __init__(
        self,
        make_score: Callable[..., ScoreFunction],
        payload: dict[str, Any],
        labels: Selector = ANY,
    ) -> None:
        self._make_score, self._labels = make_score, dict(labels)
        self._payload = store(payload)
        self._class = ray.remote(RayEvaluator)

    def start(self, kind: Kind, name: str) -> Any:
        """Asks for an actor, which Ray restarts as often as its process is lost."""
        threads = str(max(1, math.ceil(kind.cpus)))  # evaluators of a broker reserve a little less
        chosen = self._class.options(
            num_cpus=kind.cpus,
            num_gpus=kind.gpus,
            max_restarts=-1,
            max_task_retries=0,
            label_selector=self._labels or None,
            scheduling_strategy="DEFAULT",  # not in the bundle of a Tune trial that makes the pool
            runtime_env={"env_vars": dict.fromkeys(THREAD_VARIABLES, threads)},
        )
        return chosen.remote(name)

    def locate(self, actor: Any) -> ray.ObjectRef:
        """Asks an actor for the id of its node."""
        return actor.locate.remote()

    def prepare(self, actor: Any, kind: Kind) -> ray.ObjectRef:
        """Asks an actor to build its score function."""
        share = {"gpu": ray.put(kind.gpus)} if kind.gpus else {}
        return actor.prepare.remote(self._make_score, self._payload | share)

    def score(self, actor: Any, candidate: Candidate, attempt: int) -> ray.ObjectRef:
        """Asks an actor for a measurement."""
        return actor.score.remote(candidate, attempt)

    def wait(self, calls: Sequence[ray.ObjectRef], timeout: float) -> list[ray.ObjectRef]:
        """All calls that have an outcome; waits up to `timeout` seconds for the first."""
        finished, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        if not finished and timeout > 0:
            finished, _ = ray.wait(list(calls), timeout=timeout)
        return finished

    def outcome(self, call: ray.ObjectRef) -> Any:
        """What a call returned, or the error in its place."""
        return get_outcome(call)

    def kill(self, actor: Any) -> None:
        """Ends an actor for good."""
        if ray.is_initialized():
            ray.kill(actor)

    def close(self) -> None:
        """Drops the stored payload."""
        self._payload.clear()

    def nodes(self) -> Nodes:
        """The nodes that are there."""
        return read_nodes(self._labels)

    def free_cpus(self) -> float:
        """CPUs of the cluster that nobody has reserved."""
        return read_free().get("CPU", 0.0)

    def now(self) -> float:
        """Seconds of a clock that never goes back."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Waits."""
        time.sleep(seconds)
