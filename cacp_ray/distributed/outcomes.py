"""What came of a task on an actor, in one line where it failed."""

import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError

from cacp_ray.evaluation.measurement import Measurement


def get_outcome(ref: ray.ObjectRef) -> Any:
    """The value of a finished task, or the error in its place."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def describe(error: Exception) -> str:
    """One line of what happened, without Ray's own frames."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        lines = str(cause).strip().splitlines()
        return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    if isinstance(error, RayActorError):
        return f"its process died or its node went away ({type(error).__name__})"
    lines: Sequence[str] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def as_failed(index: int, attempt: int, evaluator: str, reason: str) -> Measurement:
    """The measurement of a candidate that is given up."""
    return Measurement(
        index=index,
        top1=0.0,
        top5=0.0,
        loss=0.0,
        images=0,
        seconds=0.0,
        status="failed",
        error=reason,
        evaluator=evaluator,
        node="",
        attempt=attempt,
        finished_at=time.time(),
    )
