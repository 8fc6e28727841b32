import dataclasses
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray
from ray.util.metrics import Counter, Gauge

from cacp_ray.data.images import ImageSet
from cacp_ray.distributed import fleet
from cacp_ray.distributed import pool as module
from cacp_ray.distributed.fleet import Slot
from cacp_ray.distributed.nodes import Kind, Nodes
from cacp_ray.distributed.pool import RayEvaluatorPool, Work
from cacp_ray.distributed.tasks import share
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

# The first keep count tells the score function of these tests what to do.
SLEEP, SLEEP_LONG, CRASH, RAISE, HANG_ONCE = range(5)


def make_obedient(folder: str, images: NDArray[np.float32], parts: dict[str, Any]) -> ScoreFunction:
    """Notes its process in `folder`; top5 tells whether the payload is shared, loss the threads."""
    (Path(folder) / str(os.getpid())).touch()
    shared = [images, parts["labels"]]
    is_shared = all(not a.flags.owndata and not a.flags.writeable for a in shared)

    def score(candidate: Candidate) -> Measurement:
        order = candidate.keep_counts[0]
        if order == CRASH:
            os.kill(os.getpid(), signal.SIGKILL)
        if order == RAISE:
            raise ValueError("group 2\nkeeps nothing")
        if order == HANG_ONCE and not (hung := Path(folder).with_suffix(".hung")).exists():
            hung.touch()
            time.sleep(600)
        time.sleep(0.25 if order == SLEEP_LONG else 0.03)
        top1 = float(images[candidate.index])
        threads = float(os.environ["OMP_NUM_THREADS"])
        return Measurement(candidate.index, top1, float(is_shared), threads, 10, 0.0)

    return score


def make_impossible(path: str) -> ScoreFunction:
    raise FileNotFoundError(f"{path} is not on this node\nreally")


def make_dying() -> ScoreFunction:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


class Shared:
    """A pool of two actors and the folder where their processes are noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        payload = {
            "folder": str(folder),
            "images": np.arange(1_000_000, dtype=np.float32),
            "parts": {"labels": np.zeros(500_000, dtype=np.int64)},
        }
        self.pool = RayEvaluatorPool(
            make_obedient, payload, num_evaluators=2, cpus_per_evaluator=0.5
        )

    @property
    def processes(self) -> list[int]:
        """Ids of the noted processes that run now."""
        noted = [int(path.name) for path in self.folder.iterdir()]
        return sorted(pid for pid in noted if Path(f"/proc/{pid}").exists())

    def wait(self) -> None:
        """Waits until both actors are ready."""
        deadline = time.monotonic() + 30
        while self.pool.num_alive < 2 and time.monotonic() < deadline:
            self.pool.results(0.0)
            time.sleep(0.02)
        assert self.pool.num_alive == 2

    def score(
        self, orders: Sequence[int], on_result: Callable[[int], None] = lambda _: None
    ) -> list[Measurement]:
        """Submits one candidate for each order; every one must come back exactly once."""
        for index, order in enumerate(orders):
            self.pool.submit(Candidate(0.5, (order, index), index=index))
        measured: list[Measurement] = []
        deadline = time.monotonic() + 40
        while len(measured) < len(orders) and time.monotonic() < deadline:
            measured += self.pool.results(0.5)
            on_result(len(measured))
        measured += self.pool.results(0.0)
        assert sorted(m.index for m in measured) == list(range(len(orders)))
        return measured


@pytest.fixture(scope="module")
def shared(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    shared = Shared(tmp_path_factory.mktemp("processes"))
    yield shared
    shared.pool.close()


def test_candidates_come_back_once_and_in_no_order(shared: Shared) -> None:
    if shared.pool.num_alive == 0:
        assert shared.pool.capacity == 2  # queued while nobody is ready
    measured = shared.score([SLEEP_LONG] + 19 * [SLEEP])
    order = [m.index for m in measured]
    assert order != sorted(order)
    for m in measured:
        assert (m.status, m.attempt, m.top1) == ("ok", 1, m.index)
        assert m.finished_at > 0
        assert m.node not in ("", "local")
    shared.wait()
    assert shared.pool.capacity == 4


def test_the_payload_is_shared_without_a_copy_and_threads_follow_the_cpus(shared: Shared) -> None:
    (measured,) = shared.score([SLEEP])
    assert measured.top5 == 1.0
    assert measured.loss == 1.0  # half a CPU: one thread


def test_submitting_does_not_block_and_an_idle_pool_answers_at_once(shared: Shared) -> None:
    shared.wait()
    started = time.monotonic()
    assert shared.pool.results(10.0) == []
    assert time.monotonic() - started < 1.0
    started = time.monotonic()
    shared.pool.submit(Candidate(0.5, (SLEEP_LONG, 0), index=0))
    assert time.monotonic() - started < 0.2
    assert shared.pool.results(0.01) == []
    assert [m.index for m in shared.pool.results(10.0)] == [0]


def test_a_killed_evaluator_loses_nothing_and_comes_back(shared: Shared) -> None:
    shared.wait()
    before = shared.processes
    killed: list[int] = []

    def kill_one(num_found: int) -> None:
        if num_found >= 5 and not killed:
            killed.append(int(np.random.default_rng(0).choice(before)))
            os.kill(killed[0], signal.SIGKILL)

    measured = shared.score(40 * [SLEEP], kill_one)
    assert all(m.status == "ok" for m in measured)
    assert 2 in {m.attempt for m in measured}
    shared.wait()
    assert len(shared.processes) == 2
    assert killed[0] not in shared.processes


def test_losing_every_evaluator_unnoticed_is_survived(shared: Shared) -> None:
    shared.wait()
    for pid in shared.processes:
        os.kill(pid, signal.SIGKILL)
    measured = shared.score(10 * [SLEEP])
    assert all(m.status == "ok" for m in measured)


def test_a_candidate_that_crashes_its_process_fails_after_three_attempts(shared: Shared) -> None:
    shared.wait()
    measured = {m.index: m for m in shared.score([SLEEP, SLEEP, CRASH] + 9 * [SLEEP])}
    bad = measured.pop(2)
    assert (bad.status, bad.attempt, bad.top1) == ("failed", 3, 0.0)
    assert "lost with evaluator-" in bad.error
    # The candidate on the same actor is lost once, never again.
    assert all((m.status, m.attempt <= 2) == ("ok", True) for m in measured.values())


def test_a_candidate_that_raises_is_tried_elsewhere_then_failed(shared: Shared) -> None:
    shared.wait()
    before = shared.processes
    measured = {m.index: m for m in shared.score([SLEEP, RAISE] + 6 * [SLEEP])}
    bad = measured.pop(1)
    assert (bad.status, bad.attempt) == ("failed", 3)
    assert bad.error == "scoring raised ValueError: group 2"
    assert all((m.status, m.attempt) == ("ok", 1) for m in measured.values())
    assert shared.processes == before


@pytest.mark.parametrize("is_first", [False, True])
def test_an_evaluator_that_hangs_is_replaced(
    is_first: bool,
    shared: Shared,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    shared.wait()
    monkeypatch.setattr(module, "HANG_S", 1.5)
    shared.folder.with_suffix(".hung").unlink(missing_ok=True)
    orders = [HANG_ONCE] if is_first else [SLEEP, HANG_ONCE, *(5 * [SLEEP])]
    if is_first:
        monkeypatch.setattr(shared.pool, "_slowest", {})
        monkeypatch.setattr(shared.pool, "_first_patience", 1.5)
    measured = shared.score(orders)
    assert {m.status for m in measured} == {"ok"}
    assert [m.attempt for m in measured if m.index == orders.index(HANG_ONCE)] == [2]
    assert (
        len(re.findall(r"evaluator-\d has not answered for 2 s: it is replaced", caplog.text)) == 1
    )


@pytest.mark.usefixtures("ray_cluster")
def test_that_nobody_is_ready_is_told_from_when_one_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fleet, "PATIENCE_S", 0.5)
    pool = RayEvaluatorPool(make_impossible, {}, num_evaluators=1, cpus_per_evaluator=64)
    time.sleep(0.6)  # the driver measures the base network, say
    pool.results(0.0)
    assert not caplog.text
    time.sleep(0.6)
    pool.results(0.0)
    pool.close()
    assert "no evaluator is ready after 1 s: they ask for 1 x 64 CPU" in caplog.text


@pytest.mark.parametrize(
    ("make_score", "payload", "reason"),
    [
        (make_impossible, {"path": "x.npy"}, "FileNotFoundError: x.npy is not on this node"),
        (make_dying, {}, "process died"),
    ],
)
def test_a_scorer_that_cannot_be_built_ends_the_search(
    make_score: Callable[..., ScoreFunction], payload: dict[str, Any], reason: str
) -> None:
    pool = RayEvaluatorPool(make_score, payload, num_evaluators=1, cpus_per_evaluator=0.25)
    pool.submit(Candidate(0.5, (SLEEP,), index=0))
    with pytest.raises(EvaluationError, match=reason):
        pool.results(30.0)
    pool.close()
    pool.close()
    assert (pool.capacity, pool.num_alive) == (0, 0)


def locate(split: ImageSet) -> str:
    """Names the bytes of the mapped file that hold the images of its tensor."""
    from cacp_ray.data.transforms import from_shared

    address = from_shared(split.images).data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, offset, device, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if first <= address < last:
            return f"{device} {inode} {int(offset, 16) + address - first}"
    raise AssertionError("not mapped")


def make_locating(split: ImageSet) -> ScoreFunction:
    """Reports in `error` where the images are."""
    import torch  # noqa: F401 - what an evaluator of networks imports

    place = locate(split)

    def score(candidate: Candidate) -> Measurement:
        time.sleep(0.2)
        return Measurement(candidate.index, 0.5, 0.5, 0.5, 10, 0.2, error=place)

    return score


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory maps")
@pytest.mark.usefixtures("ray_cluster")
def test_the_images_of_a_split_exist_once_on_a_machine() -> None:
    images = np.zeros((500, 32, 32, 3), dtype=np.uint8)
    reference, split = share(ImageSet(images, np.zeros(500, dtype=np.int64), ("one",)))
    pool = RayEvaluatorPool(
        make_locating, {"split": reference}, num_evaluators=2, cpus_per_evaluator=0.5
    )
    try:
        deadline = time.monotonic() + 60
        while pool.num_alive < 2 and time.monotonic() < deadline:
            pool.results(0.0)
            time.sleep(0.05)
        for index in range(6):
            pool.submit(Candidate(0.5, (1,), index=index))
        measurements: list[Measurement] = []
        while len(measurements) < 6:
            measurements += pool.results(10.0)
    finally:
        pool.close()
    assert len({m.evaluator for m in measurements}) == 2
    assert {m.error for m in measurements} == {locate(split)}  # the driver reads the same bytes


def test_the_pool_tells_ray_what_it_does(shared, monkeypatch):
    counted: dict[str, float] = {}
    shown: dict[str, list[float]] = {}
    monkeypatch.setattr(
        Counter,
        "inc",
        lambda self: counted.update({self.info["name"]: counted.get(self.info["name"], 0) + 1}),
    )
    monkeypatch.setattr(
        Gauge, "set", lambda self, value: shown.setdefault(self.info["name"], []).append(value)
    )
    shared.wait()
    measured = shared.score([SLEEP_LONG] * 20 + [RAISE])
    assert counted == {"cacp_measurements": 20, "cacp_failed_measurements": 1}
    stopped = [dataclasses.replace(measured[0], status="stopped")]
    shared.pool._metrics.count(stopped)
    assert counted == {"cacp_measurements": 21, "cacp_failed_measurements": 1}
    assert shown["cacp_evaluators_alive"][-1] == 2
    assert max(shown["cacp_candidates_waiting"]) > 0
    assert max(shown["cacp_candidates_scoring"]) > 0


@pytest.mark.parametrize(
    ("failed_on", "is_given_up"),
    [
        (["here", "here"], False),
        (["here", "gone", "here"], False),
        (["here", "here", "gone", "here"], True),
        (["gone"] * 8, False),
        (["gone"] * 9, True),
    ],
)
def test_only_failures_on_nodes_that_are_still_there_are_a_candidate_s_fault(
    monkeypatch: pytest.MonkeyPatch, failed_on: list[str], is_given_up: bool
) -> None:
    monkeypatch.setattr(module, "read_nodes", lambda: Nodes({"here": 1.0}, {}, frozenset()))
    pool = object.__new__(RayEvaluatorPool)
    pool._max_attempts = 3
    assert (
        pool._is_given_up(Work(Candidate(0.5, (1,), index=0), failed_on=failed_on)) is is_given_up
    )


@pytest.fixture
def waiting(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Names the evaluators that a pool replaces: it waits for one with and one without a GPU."""
    replaced: list[str] = []
    pool = object.__new__(RayEvaluatorPool)
    pool._fleet = cast(Any, SimpleNamespace(replace=lambda slot: replaced.append(slot.name)))
    pool._slowest, pool._most_images, pool._first_patience = {}, 0, module.FIRST_HANG_S

    def wait(
        seconds: float, images: int | None = None, known: dict[Kind, float] | None = None
    ) -> list[str]:
        for kind, an_image in (known or {}).items():
            pool._note_speed(kind, Measurement(1, 0.5, 0.5, 1.0, 100, 100 * an_image))
        flights = {}
        for kind in (GPU, CPU):
            slot = Slot("gpu" if kind == GPU else "cpu", kind, None, node="here", is_ready=True)
            slot.answered_at = time.monotonic() - seconds
            flights[kind] = slot, Work(Candidate(0.5, (1,), index=0, images=images))
        pool._flights = cast(Any, flights)
        replaced.clear()
        pool._replace_hung()
        return replaced

    return wait


CPU, GPU = Kind(1.0), Kind(1.0, 0.5)


@pytest.mark.parametrize(("images", "is_replaced"), [(None, True), (100, True), (50_000, False)])
def test_a_longer_measurement_is_no_hang(
    waiting: Callable[..., list[str]], images: int | None, is_replaced: bool
) -> None:
    assert not waiting(module.HANG_S + 1, images)  # nothing is known yet
    both = {CPU: 0.02, GPU: 0.02}
    assert waiting(module.HANG_S + 1, images, both) == (["gpu", "cpu"] if is_replaced else [])


def test_patience_is_that_of_the_kind_and_grows_while_nothing_is_known(
    waiting: Callable[..., list[str]],
) -> None:
    late = module.FIRST_HANG_S + 1
    assert waiting(late) == ["gpu", "cpu"]
    assert waiting(late) == []  # twice as patient, once for both
    assert waiting(2 * late) == ["gpu", "cpu"]
    assert waiting(late, known={GPU: 0.001}) == ["gpu"]  # what a GPU takes says nothing of CPUs
    assert waiting(late, 50_000, known={CPU: 0.02}) == ["gpu"]
