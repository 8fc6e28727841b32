"""The actor that scores: one process, one score function.

This module imports no torch: `make_score` imports what scoring needs.
"""

import dataclasses
import time
from collections.abc import Callable

import ray

from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction


class NotPreparedError(Exception):
    """The process has been restarted since it was last prepared."""


class RayEvaluator:
    """Builds the score function once in its process, then scores one candidate after another.

    The payload comes with `prepare`, not with the constructor, so that Ray can restart the actor
    even when the stored objects are lost; the pool hands them over again.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._node = ray.util.get_node_ip_address()
        self._score: ScoreFunction | None = None

    def locate(self) -> str:
        """The id of its node; an answer shows that the process runs."""
        return ray.get_runtime_context().get_node_id()

    def prepare(
        self, make_score: Callable[..., ScoreFunction], payload: dict[str, ray.ObjectRef]
    ) -> None:
        """Builds the score function, unless this process has one."""
        if self._score is None:
            values = ray.get(list(payload.values()))  # arrays are views of the object store
            self._score = make_score(**dict(zip(payload, values, strict=True)))

    def score(self, candidate: Candidate, attempt: int) -> Measurement:
        """Scores a candidate and adds where and when to the measurement.

        Raises:
            NotPreparedError: The candidate was not tried; prepare the actor first.
        """
        if self._score is None:
            raise NotPreparedError(self._name)
        return dataclasses.replace(
            self._score(candidate),
            evaluator=self._name,
            node=self._node,
            attempt=attempt,
            finished_at=time.time(),
        )
