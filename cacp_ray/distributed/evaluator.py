"""The actor that scores: one process, one score function.

It imports no torch itself: what scoring needs, `make_score` imports.
"""

import dataclasses
import time
from collections.abc import Callable

import ray

from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction


class RayEvaluator:
    """Builds the score function once in its process, then scores one candidate after another."""

    def __init__(
        self, name: str, make_score: Callable[..., ScoreFunction], payload: dict[str, ray.ObjectRef]
    ) -> None:
        """Builds nothing yet, so that Ray can always construct it, a second time too.

        Args:
            name: For the measurements.
            make_score: Called as `make_score(**payload)`.
            payload: References inside a dict: as plain arguments Ray would resolve them itself and
                warn that a restart may fail. The pool owns them.
        """
        self._name = name
        self._make_score = make_score
        self._payload = payload
        self._score: ScoreFunction | None = None
        self._node = ray.util.get_node_ip_address()

    def prepare(self) -> None:
        """Builds the score function where it is not built yet."""
        self._built()

    def score(self, candidate: Candidate, attempt: int) -> Measurement:
        """Scores a candidate and notes where and when."""
        return dataclasses.replace(
            self._built()(candidate),
            evaluator=self._name,
            node=self._node,
            attempt=attempt,
            finished_at=time.time(),
        )

    def _built(self) -> ScoreFunction:
        if self._score is None:
            values = ray.get(list(self._payload.values()))  # arrays are views of the object store
            self._score = self._make_score(**dict(zip(self._payload, values, strict=True)))
        return self._score
