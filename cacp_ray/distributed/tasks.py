"""Runs functions as Ray tasks, one for each item, on chosen nodes or wherever resources are free.

The driver counts the attempts: Ray would begin a task again for ever whose process is killed for
its memory.
"""

import logging
import math
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cacp_ray.errors import CacpError, ConfigError, EvaluationError, first_line
from cacp_ray.io.environment import with_same_versions

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
Value = TypeVar("Value")


def share(value: Value) -> tuple[ray.ObjectRef, Value]:
    """Stores a value in Ray's object store, once for all processes of a machine.

    Returns:
        The reference, and the value as the store has it: its numpy arrays are read there without a
        copy, and read-only, as long as Ray is connected.
    """
    ref = ray.put(value)
    return ref, ray.get(ref)


def check_sendable(parts: Mapping[str, Any], to: str = "evaluators") -> None:
    """Refuses objects that cannot be sent to other processes.

    Args:
        parts: The objects, by the names that their owner knows.
        to: What the other processes are called.

    Raises:
        ConfigError: Naming the first one.
    """
    for name, part in parts.items():
        try:
            # `ray.put` pickles alike, but its error fills pages.
            ray.cloudpickle.dumps(part)  # pyright: ignore[reportAttributeAccessIssue]
        except Exception as error:  # whatever the objects inside raise
            raise ConfigError(
                f"{name} cannot be sent to {to} ({first_line(error)}): open files, connections and "
                "loaders inside it, when it is called"
            ) from error


def store(values: Mapping[str, Any]) -> dict[str, ray.ObjectRef]:
    """Stores each value, unless it is a reference in Ray's store already."""
    return {
        name: value if isinstance(value, ray.ObjectRef) else ray.put(value)
        for name, value in values.items()
    }


def on_node(task: Any, node: str) -> Any:
    """The remote function, to run on that node alone."""
    return task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False))


def run_tasks(
    begin: Callable[[Item], ray.ObjectRef],
    items: Sequence[Item],
    *,
    name: str = "a task",  # what the log calls a task that begins again
    limit: int = sys.maxsize,  # tasks in flight at once
    in_order: bool = False,  # yield in the order of the items, not as tasks end
    max_attempts: int = 1,  # where a task's process or node is lost
    timeout: float = math.inf,
    is_stuck: Callable[[Item], bool] = lambda item: False,  # its task must begin again
    say: Callable[[int], object] = lambda left: None,
    say_seconds: float = 30.0,
    kills: bool = True,
) -> Generator[tuple[Item, Any], None, None]:
    """Yields every item with what its task returned, or with the error that ended it.

    Tasks that have not ended are cancelled after `timeout` seconds, and when the caller stops: they
    are killed, or without `kills` interrupted and waited for. When no task has ended for
    `say_seconds`, `say` is told how many items are left, and `is_stuck` is asked about each.
    """
    deadline = time.monotonic() + timeout
    queue = deque(enumerate(items))
    running: dict[int, ray.ObjectRef] = {}
    attempts: Counter[int] = Counter()
    try:
        while queue or running:
            while queue and len(running) < limit:
                number, item = queue.popleft()
                running[number] = begin(item)
            watched = [min(running)] if in_order else list(running)
            left = max(0.0, min(say_seconds, deadline - time.monotonic()))
            done, _ = ray.wait([running[number] for number in watched], timeout=left)
            if not done:
                if time.monotonic() >= deadline:
                    return
                say(len(running) + len(queue))
                for number in watched:
                    if is_stuck(items[number]):
                        _cancel([running.pop(number)], kills=kills)
                        queue.appendleft((number, items[number]))
                continue
            number = next(number for number in watched if running[number] == done[0])
            outcome = get_outcome(running.pop(number))
            del done  # with the last reference, Ray forgets the value
            attempts[number] += 1
            if is_lost(outcome) and attempts[number] < max_attempts:
                logger.warning("%s is begun again: %s", name, describe(outcome))
                queue.appendleft((number, items[number]))
            else:
                yield items[number], outcome
    finally:
        _cancel(list(running.values()), kills=kills)


def run_once(function: Callable[..., Value], *args: Any, cpus: int, name: str) -> Value:
    """What a function returns that runs as one task with these CPUs, wherever they are free.

    Raises:
        CacpError: What the function raised.
        EvaluationError: It raised something else, or its process was lost too often.
    """
    task: Any = ray.remote(num_cpus=cpus, max_retries=0)(with_same_versions(_run_with_threads))
    stored = [ray.put(arg) for arg in args]
    outcomes = run_tasks(
        lambda _: task.remote(function, cpus, *stored), [name], name=name, max_attempts=3
    )
    ((_, outcome),) = outcomes
    if isinstance(outcome, RayTaskError) and isinstance(outcome.cause, CacpError):
        raise outcome.cause
    if isinstance(outcome, Exception):
        raise EvaluationError(f"{name} failed: {describe(outcome)}") from outcome
    return outcome


def _run_with_threads(function: Callable[..., Value], cpus: int, *args: Any) -> Value:
    import torch

    torch.set_num_threads(cpus)
    return function(*args)


def get_outcome(ref: ray.ObjectRef) -> Any:
    """The value of a finished task, or the error in its place."""
    try:
        return ray.get(ref)
    except RayError as error:
        return error


def is_lost(outcome: object) -> bool:
    """Whether a task ended without its function's doing: its process died or its node went away."""
    return isinstance(outcome, RayError) and not isinstance(outcome, RayTaskError)


def describe(error: Exception) -> str:
    """What happened, in one line and without Ray's own frames."""
    if isinstance(error, RayTaskError):
        cause = error.cause
        lines = str(cause).strip().splitlines()
        return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    if isinstance(error, RayActorError):
        return f"its process died or its node went away ({type(error).__name__})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _cancel(refs: Sequence[ray.ObjectRef], *, kills: bool) -> None:
    if not ray.is_initialized():
        return
    for ref in refs:
        ray.cancel(ref, force=kills)
    if not kills:
        for ref in refs:
            with suppress(RayError):
                ray.get(ref)  # Ray prints errors that nobody has looked at
