"""Functions as tasks: order, limit, attempts, time, and tasks that can no longer run."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import RayTaskError

from cacp_ray.distributed.tasks import is_lost, run_tasks

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def rest(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def die_or_fail(item: str) -> None:
    if item == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    raise ValueError(item)


def begin(seconds: float) -> ray.ObjectRef:
    return ray.remote(num_cpus=0)(rest).remote(seconds)


def test_values_come_as_tasks_end_or_in_the_order_of_the_items() -> None:
    list(run_tasks(begin, [0.0, 0.0]))  # workers have started
    assert list(run_tasks(begin, [1.5, 0.0])) == [(0.0, 0.0), (1.5, 1.5)]
    assert list(run_tasks(begin, [1.5, 0.0], in_order=True)) == [(1.5, 1.5), (0.0, 0.0)]


def test_no_more_tasks_than_the_limit_are_in_flight() -> None:
    begun: list[int] = []

    def note(item: int) -> ray.ObjectRef:
        begun.append(item)
        return begin(0.0)

    for number, _ in enumerate(run_tasks(note, range(6), limit=2), start=1):
        assert len(begun) <= number + 1
    assert begun == list(range(6))


def test_a_lost_task_begins_again_and_one_that_raises_does_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    begun: list[str] = []

    def note(item: str) -> Any:
        begun.append(item)
        return ray.remote(num_cpus=0, max_retries=0)(die_or_fail).remote(item)

    outcomes = dict(run_tasks(note, ["dies", "fails"], name="a test", max_attempts=2))
    assert sorted(begun) == ["dies", "dies", "fails"]
    assert is_lost(outcomes["dies"])
    assert isinstance(outcomes["fails"], RayTaskError)
    assert caplog.text.count("a test is begun again: ") == 1


def test_what_has_not_ended_in_time_is_cancelled(tmp_path: Path) -> None:
    def write(seconds: float) -> None:
        time.sleep(seconds)
        (tmp_path / f"{seconds}").touch()

    task = ray.remote(num_cpus=0, max_retries=0)(write)
    list(run_tasks(begin, [0.0, 0.0]))  # workers have started
    outcomes = run_tasks(task.remote, [0.0, 3.0], timeout=2.0)
    assert [item for item, _ in outcomes] == [0.0]
    time.sleep(1.5)
    assert [path.name for path in tmp_path.iterdir()] == ["0.0"]


def test_a_task_that_can_no_longer_run_begins_again() -> None:
    impossible = ray.remote(num_cpus=64)(rest)
    refs = [impossible.remote(0.0), begin(0.0)]
    told: list[int] = []
    outcomes = run_tasks(
        lambda item: refs.pop(0), ["item"], is_stuck=bool, say=told.append, say_seconds=0.5
    )
    assert list(outcomes) == [("item", 0.0)]
    assert told == [1]
