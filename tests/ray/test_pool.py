import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

BAD = 3


def measured(candidate: Candidate) -> Measurement:
    top1 = sum(candidate.keep_counts) / 100
    return Measurement(candidate.index, top1, top1, 1 - top1, images=10, seconds=0.0)


def make_sleeping(folder: str, seconds: float) -> ScoreFunction:
    (Path(folder) / str(os.getpid())).touch()

    def score(candidate: Candidate) -> Measurement:
        time.sleep(seconds * (5 if candidate.index == 0 else 1))
        return measured(candidate)

    return score


def make_crashing() -> ScoreFunction:
    def score(candidate: Candidate) -> Measurement:
        if candidate.index == BAD:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.01)
        return measured(candidate)

    return score


def make_raising() -> ScoreFunction:
    def score(candidate: Candidate) -> Measurement:
        if candidate.index == BAD:
            raise ValueError("group 2\nkeeps nothing")
        return measured(candidate)

    return score


def make_impossible(path: str) -> ScoreFunction:
    raise FileNotFoundError(f"{path} is not on this node")


def make_dying() -> ScoreFunction:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def make_inspecting(images: NDArray[np.float32], parts: dict[str, Any]) -> ScoreFunction:
    """Answers with what the actor sees: writable? own memory? threads?"""

    def score(candidate: Candidate) -> Measurement:
        arrays = [images, parts["labels"]]
        is_view = all(not a.flags.owndata and not a.flags.writeable for a in arrays)
        loss = float(os.environ["OMP_NUM_THREADS"])
        return Measurement(candidate.index, float(is_view), float(images[-1]), loss, 1, 0.0)

    return score


@contextlib.contextmanager
def running(
    make_score: Callable[..., ScoreFunction], payload: dict[str, Any], num_evaluators: int = 2
) -> Iterator[RayEvaluatorPool]:
    pool = RayEvaluatorPool(
        make_score, payload, num_evaluators=num_evaluators, cpus_per_evaluator=0.25
    )
    try:
        yield pool
    finally:
        pool.close()


def candidates(count: int) -> list[Candidate]:
    return [Candidate(i, 0.5, (i, i + 1)) for i in range(count)]


def collect(
    pool: RayEvaluatorPool,
    count: int,
    on_result: Callable[[int], None] = lambda _: None,
    seconds: float = 30,
) -> list[Measurement]:
    """The next `count` measurements, and any that come too many within a moment."""
    found: list[Measurement] = []
    deadline = time.monotonic() + seconds
    while len(found) < count and time.monotonic() < deadline:
        found += pool.results(1.0)
        on_result(len(found))
    return found + pool.results(0.1)


def wait_for(pool: RayEvaluatorPool, num_alive: int) -> None:
    deadline = time.monotonic() + 20
    while pool.num_alive < num_alive and time.monotonic() < deadline:
        pool.results(0.0)
        time.sleep(0.05)
    assert pool.num_alive == num_alive


def test_every_candidate_comes_back_once_and_in_no_order(tmp_path: Path) -> None:
    asked = candidates(40)
    with running(make_sleeping, {"folder": str(tmp_path), "seconds": 0.02}) as pool:
        assert (pool.capacity, pool.num_alive) == (2, 0)  # queued while nobody is ready
        started = time.monotonic()
        for candidate in asked:
            pool.submit(candidate)
        assert time.monotonic() - started < 0.5
        found = collect(pool, 40)
        assert (pool.capacity, pool.num_alive) == (4, 2)
    order = [m.index for m in found]
    assert order != sorted(order)
    assert sorted(order) == list(range(40))
    for m in found:
        assert m.top1 == measured(asked[m.index]).top1
        assert (m.status, m.attempt) == ("ok", 1)
        assert m.finished_at > 0
        assert m.node
    assert {m.evaluator for m in found} == {"evaluator-0", "evaluator-1"}


def test_a_killed_evaluator_loses_nothing_and_comes_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    killed: list[str] = []

    def kill_one(num_found: int) -> None:
        if num_found >= 5 and not killed:
            killed.append(rng.choice(sorted(p.name for p in tmp_path.iterdir())))
            os.kill(int(killed[0]), signal.SIGKILL)

    with running(make_sleeping, {"folder": str(tmp_path), "seconds": 0.05}) as pool:
        wait_for(pool, 2)
        for candidate in candidates(60):
            pool.submit(candidate)
        found = collect(pool, 60, kill_one)
        wait_for(pool, 2)
    assert killed
    assert sorted(m.index for m in found) == list(range(60))
    assert all(m.status == "ok" for m in found)
    assert 2 in {m.attempt for m in found}
    assert len(list(tmp_path.iterdir())) == 3  # the actor came back as a third process


def test_losing_every_evaluator_is_survived(tmp_path: Path) -> None:
    with running(make_sleeping, {"folder": str(tmp_path), "seconds": 0.05}) as pool:
        wait_for(pool, 2)
        for candidate in candidates(20):
            pool.submit(candidate)
        for path in tmp_path.iterdir():
            os.kill(int(path.name), signal.SIGKILL)
        found = collect(pool, 20)
    assert sorted(m.index for m in found) == list(range(20))
    assert all(m.status == "ok" for m in found)


def test_a_candidate_that_crashes_its_process_fails_after_three_attempts() -> None:
    with running(make_crashing, {}) as pool:
        wait_for(pool, 2)
        for candidate in candidates(12):
            pool.submit(candidate)
        found = {m.index: m for m in collect(pool, 12)}
    assert sorted(found) == list(range(12))
    bad = found.pop(BAD)
    assert (bad.status, bad.attempt, bad.top1) == ("failed", 3, 0.0)
    assert "lost with evaluator-" in bad.error
    assert "\n" not in bad.error
    assert all(
        m.status == "ok" and m.attempt <= 2 for m in found.values()
    )  # beside it at most once


def test_a_candidate_that_raises_is_tried_elsewhere_then_failed() -> None:
    with running(make_raising, {}, num_evaluators=3) as pool:
        wait_for(pool, 3)
        for candidate in candidates(8):
            pool.submit(candidate)
        found = {m.index: m for m in collect(pool, 8)}
        assert pool.num_alive == 3
    assert sorted(found) == list(range(8))
    bad = found.pop(BAD)
    assert (bad.status, bad.attempt) == ("failed", 3)
    assert bad.error == "scoring raised ValueError: group 2"
    assert all(m.status == "ok" for m in found.values())


@pytest.mark.parametrize(
    ("make_score", "payload", "reason"),
    [
        (make_impossible, {"path": "x.npy"}, "x.npy is not on this node"),
        (make_dying, {}, "process died"),
    ],
)
def test_a_scorer_that_cannot_be_built_ends_the_search(
    make_score: Callable[..., ScoreFunction], payload: dict[str, Any], reason: str
) -> None:
    with running(make_score, payload) as pool:
        pool.submit(candidates(1)[0])
        with pytest.raises(EvaluationError, match=reason):
            collect(pool, 1)


def test_the_payload_is_shared_without_a_copy() -> None:
    payload = {
        "images": np.arange(1_000_000, dtype=np.float32),
        "parts": {"labels": np.zeros(500_000, dtype=np.int64)},
    }
    with running(make_inspecting, payload, num_evaluators=1) as pool:
        pool.submit(candidates(1)[0])
        (found,) = collect(pool, 1)
    assert found.top1 == 1.0
    assert found.top5 == 999_999.0
    assert found.loss == 1.0  # a quarter of a CPU: one thread


def test_an_idle_pool_answers_at_once_and_closes_twice() -> None:
    with running(make_crashing, {}, num_evaluators=1) as pool:
        started = time.monotonic()
        assert pool.results(10.0) == []
        assert time.monotonic() - started < 1
        pool.close()
        assert (pool.capacity, pool.num_alive) == (0, 0)
