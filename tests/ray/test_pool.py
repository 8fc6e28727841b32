"""A pool of real actors: what they share with the driver, and a real kill.

What a pool does about losses, errors and hangs is in tests/unit/distributed/test_pool.py.
"""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from cacp_ray.data.images import ImageSet
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.distributed.tasks import share
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from tests.small import measurement_of

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


def make_noted(folder: str, images: NDArray[np.float32], parts: dict[str, Any]) -> ScoreFunction:
    """Notes its process in `folder`; top5 tells whether the payload is shared, loss the threads."""
    (Path(folder) / str(os.getpid())).touch()
    shared = [images, parts["labels"]]
    is_shared = all(not a.flags.owndata and not a.flags.writeable for a in shared)

    def score(candidate: Candidate) -> Measurement:
        time.sleep(0.03)
        score = float(images[candidate.index])
        threads = float(os.environ["OMP_NUM_THREADS"])
        return measurement_of(candidate.index, score, float(is_shared), threads, 10, 0.0)

    return score


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the processes of actors are noted."""
    (tmp_path / "processes").mkdir()
    return tmp_path / "processes"


@pytest.fixture
def pool(folder: Path) -> Iterator[RayEvaluatorPool]:
    payload = {
        "folder": str(folder),
        "images": np.arange(1_000_000, dtype=np.float32),
        "parts": {"labels": np.zeros(500_000, dtype=np.int64)},
    }
    pool = RayEvaluatorPool(
        RayActors(make_noted, payload), num_evaluators=2, cpus_per_evaluator=0.5
    )
    yield pool
    pool.close()


def running(folder: Path) -> list[int]:
    """Ids of the noted processes that run now."""
    noted = [int(path.name) for path in folder.iterdir()]
    return sorted(pid for pid in noted if Path(f"/proc/{pid}").exists())


def wait(pool: RayEvaluatorPool) -> None:
    """Waits until both actors are ready."""
    deadline = time.monotonic() + 60
    while pool.num_alive < 2 and time.monotonic() < deadline:
        pool.results(0.05)
        time.sleep(0.02)
    assert pool.num_alive == 2


def collect(pool: RayEvaluatorPool, number: int) -> list[Measurement]:
    measured: list[Measurement] = []
    deadline = time.monotonic() + 60
    while len(measured) < number and time.monotonic() < deadline:
        measured += pool.results(0.5)
    return measured


def test_a_killed_evaluator_loses_nothing_and_the_payload_is_shared(
    pool: RayEvaluatorPool, folder: Path
) -> None:
    wait(pool)
    before = running(folder)
    for index in range(40):
        pool.submit(Candidate(0.5, (1, index), index=index))
    measured = collect(pool, 5)
    os.kill(before[0], signal.SIGKILL)
    measured += collect(pool, 40 - len(measured))
    assert sorted(m.index for m in measured) == list(range(40))
    assert all((m.status, m.score, m.figures["top5"]) == ("ok", m.index, 1.0) for m in measured)
    assert {m.loss for m in measured} == {1.0}  # half a CPU: one thread
    assert {m.attempt for m in measured} == {1, 2}
    assert all(m.finished_at > 0 and m.node not in ("", "local") for m in measured)
    wait(pool)
    assert len(running(folder)) == 2
    assert before[0] not in running(folder)


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
        return measurement_of(candidate.index, 0.5, 0.5, 0.5, 10, 0.2, error=place)

    return score


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's memory maps")
def test_the_images_of_a_split_exist_once_on_a_machine() -> None:
    images = np.zeros((500, 32, 32, 3), dtype=np.uint8)
    reference, split = share(ImageSet(images, np.zeros(500, dtype=np.int64), ("one",)))
    pool = RayEvaluatorPool(
        RayActors(make_locating, {"split": reference}), num_evaluators=2, cpus_per_evaluator=0.5
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
