"""Scoring on a GPU; for machines that have one (`pytest -m gpu`)."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation import gpu, scorer
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.searching.budget import uniform
from cacp_ray.workflows.setup import Setup

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_reason_and_the_next_step_are_one_line():
    with pytest.raises(EvaluationError, match=r"set cluster\.gpus_per_evaluator to 0") as caught:
        gpu.open_gpu(0.5)
    assert "\n" not in str(caught.value)


@pytest.fixture
def memory(monkeypatch):
    """A GPU of 8 GB, on which 100 MB are held and an image takes `image_bytes` bytes."""
    state = SimpleNamespace(held=100 * 2**20, image_bytes=2**20, total=2**33, others=0)
    cuda = torch.cuda
    properties = SimpleNamespace(total_memory=state.total)
    monkeypatch.setattr(cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(cuda, "memory_allocated", lambda: state.held)
    monkeypatch.setattr(cuda, "memory_reserved", lambda: state.held)
    monkeypatch.setattr(
        cuda,
        "mem_get_info",
        lambda: (state.total - state.held - gpu.CONTEXT_BYTES - state.others, state.total),
    )
    monkeypatch.setattr(
        cuda, "max_memory_allocated", lambda: state.held + state.image_bytes * gpu.TRIED_IMAGES
    )
    return state


@pytest.mark.parametrize(("image_bytes", "size"), [(2**20, 716), (2**30, 1), (1, 900)])
def test_the_batch_is_what_the_memory_holds(memory, image_bytes, size):
    """CUDA's own 0.5 GB, weights and later memory leave 1 GB of a share of 2 GB."""
    memory.image_bytes = image_bytes
    seen = []
    measured = gpu.measure_image(lambda *where: seen.append(where), range(900))
    assert [where[1:] for where in seen] == [(0, gpu.TRIED_IMAGES)]
    assert measured == image_bytes
    assert gpu.fit_batch(measured, 900, 0.25, 412 * 2**20) == size


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    image_bytes=st.integers(1, 2**27),
    held=st.integers(0, 2**31),
    kept=st.integers(0, 2**29),
    batch=st.integers(1, gpu.MAX_BATCH),
)
def test_of_evaluators_that_a_gpu_holds_each_has_memory_for_its_batch(
    memory, image_bytes, held, kept, batch
):
    memory.held = held
    need = gpu.find_need(image_bytes, batch, kept, 0)
    number = need.num_evaluators
    assert 1 <= number <= gpu.MAX_EVALUATORS
    if need.evaluator > need.gpu:
        assert number == 1
        return
    assert number * need.evaluator <= need.gpu
    if number < gpu.MAX_EVALUATORS:
        assert (number + 1) * need.evaluator > need.gpu
    assert gpu.fit_batch(image_bytes, gpu.MAX_BATCH, 1 / number, kept) >= batch - 1  # rounding


def test_what_others_hold_is_not_shared_and_repairs_need_room_too(memory):
    alone = gpu.find_need(2**20, 100, 0, 0)
    assert alone.gpu == memory.total
    memory.others = 2**32
    assert gpu.find_need(2**20, 100, 0, 0).gpu == memory.total - 2**32
    repairing = gpu.find_need(2**20, 100, 0, 2**30)
    assert repairing.evaluator == gpu.CONTEXT_BYTES + memory.held + 2**30


def test_a_batch_that_a_gpu_likes_is_of_many_small_images_or_few_large_ones():
    assert gpu.gpu_batch_size(32 * 32, 5000) == 4096
    assert gpu.gpu_batch_size(224 * 224, 5000) == 83
    assert gpu.gpu_batch_size(224 * 224, 50) == 50
    assert gpu.gpu_batch_size(4000 * 4000, 50) == 1


@pytest.mark.parametrize("recovery", ["none", "compensate"])
def test_the_need_of_an_evaluator_is_that_of_all_it_loads(memory, monkeypatch, recovery):
    """The CPU stands in for a GPU with a made-up memory."""
    config = load_config(
        RunConfig,
        {
            "pruning": {"recovery": recovery, "criterion": "l1", "calibration_images": 32},
            "data": {"search": {"path": "embedded:search", "rows": [0, 64]}},
        },
    )
    base = Setup.create(config)
    loaded, load = [], scorer._load
    monkeypatch.setattr(scorer, "open_gpu", loaded.append)
    monkeypatch.setattr(scorer, "_load", lambda *args: load(*args[:-1], "cpu"))
    prepared = base.prepare().prepared
    need = scorer.measure_need(
        prepared, base.search, recovery=recovery, dtype="float32", threads=1, images=None
    )
    kept = CACHE_BYTES if recovery == "compensate" else 0
    # Loading the network, told as an image of 16 that are tried, takes less than its batches.
    rest = memory.image_bytes * len(base.search) / gpu.FILL
    assert loaded == [1.0]
    assert need == gpu.Need(gpu.CONTEXT_BYTES + memory.held + kept + rest, memory.total)
    given = scorer.measure_need(
        prepared, base.search, recovery=recovery, dtype="float32", batch_size=20
    )
    assert need.evaluator - given.evaluator == pytest.approx(
        memory.image_bytes * (len(base.search) - 20) / gpu.FILL
    )


@pytest.fixture
def full_gpu(monkeypatch):
    """A GPU on which nothing can be loaded."""

    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "open_gpu", lambda share: None)
    monkeypatch.setattr(scorer, "_load", run_out)


@pytest.mark.usefixtures("full_gpu")
def test_what_a_gpu_of_its_own_cannot_hold_is_one_line_with_the_next_step():
    with pytest.raises(EvaluationError, match=r"do not fit into a GPU's memory: set data.search"):
        scorer.measure_need(None, None, recovery="none", dtype="float32")


@pytest.mark.usefixtures("full_gpu")
def test_what_does_not_fit_is_one_line_with_the_next_step():
    with pytest.raises(EvaluationError, match=r"do not fit into 0\.25 .* set cluster"):
        Scorer(None, None, recovery="none", dtype="auto", gpu=0.25)


class TestOnAGpu:
    pytestmark = needs_gpu

    def test_as_many_evaluators_as_are_said_to_fit_score_side_by_side(self):
        """Torch limits the memory of each share: an evaluator that needs more fails."""
        config = load_config(RunConfig, {})
        base = Setup.create(config)
        prepared = base.prepare().prepared
        need = scorer.measure_need(prepared, base.search, recovery="compensate", dtype="auto")
        assert gpu.CONTEXT_BYTES < need.evaluator < need.gpu
        share = 1 / need.num_evaluators
        counts = uniform(base.budget, [0.5], np.ones(len(base.budget.num_channels)))
        candidate = Candidate(0.5, tuple(counts[0].tolist()), index=0)
        tops = {
            Scorer(prepared, base.search, recovery="compensate", dtype="auto", gpu=share)(
                candidate
            ).score
            for _ in range(2)
        }
        assert len(tops) == 1

    @pytest.mark.parametrize("recovery", ["none", "bn", "compensate"])
    @pytest.mark.parametrize("dtype", ["float32", "auto"])
    def test_a_candidate_scores_as_on_the_cpu(self, recovery, dtype):
        config = load_config(RunConfig, {"pruning": {"recovery": recovery}})
        base = Setup.create(config)
        prepared = base.prepare().prepared
        counts = uniform(base.budget, [0.3, 0.6], np.ones(len(base.budget.num_channels)))
        on_cpu, on_gpu = (
            Scorer(prepared, base.search, recovery=recovery, dtype=dtype, gpu=share)
            for share in (0.0, 0.5)
        )
        for index, row in enumerate(counts.tolist()):
            candidate = Candidate(0.5, tuple(row), index=index)
            first, second = on_cpu(candidate), on_gpu(candidate)
            assert second.images == first.images
            assert second.score == pytest.approx(first.score, abs=0.01)
            assert second.loss == pytest.approx(first.loss, rel=0.02)
