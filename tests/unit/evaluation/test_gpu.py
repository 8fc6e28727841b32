"""Scoring on a GPU; for machines that have one (`pytest -m gpu`)."""

import numpy as np
import pytest
import torch

from cacp_ray.config import RunConfig, load_config
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation import gpu, scorer
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.loading import load_base, prepare_base
from cacp_ray.searching.budget import uniform

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_reason_and_the_next_step_are_one_line():
    with pytest.raises(EvaluationError, match=r"set cluster\.gpus_per_evaluator to 0") as caught:
        gpu.open_gpu(0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("each", "size"), [(2**20, 716), (2**30, 1), (1, 900)])
def test_the_batch_is_what_the_memory_holds(monkeypatch, each, size):
    """1 GB is left of a share of 2 GB less CUDA's own 0.5, weights and what comes later."""
    used, later = 100 * 2**20, 412 * 2**20
    memory = type("Properties", (), {"total_memory": 2**33})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: memory)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: used)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: used + each * gpu.TRIED_IMAGES)
    seen = []
    found = gpu.fit_batch(lambda *where: seen.append(where), range(900), 0.25, later)
    assert [where[1:] for where in seen] == [(0, gpu.TRIED_IMAGES)]
    assert found == size


def test_what_does_not_fit_is_one_line_with_the_next_step(monkeypatch):
    def run_out(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scorer, "open_gpu", lambda share: None)
    monkeypatch.setattr(scorer, "Cutters", run_out)
    with pytest.raises(EvaluationError, match=r"do not fit into 0\.25 .* raise cluster"):
        make_scorer(None, None, recovery="none", dtype="auto", gpu=0.25)


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("recovery", ["none", "bn", "compensate"])
    @pytest.mark.parametrize("dtype", ["float32", "auto"])
    def test_a_candidate_scores_as_on_the_cpu(self, recovery, dtype):
        config = load_config(RunConfig, {"pruning": {"recovery": recovery}})
        base = load_base(config)
        prepared = prepare_base(base, config)
        counts = uniform(base.budget, [0.3, 0.6], np.ones(len(base.budget.num_channels)))
        on_cpu, on_gpu = (
            make_scorer(prepared, base.search, recovery=recovery, dtype=dtype, gpu=share)
            for share in (0.0, 0.5)
        )
        for index, row in enumerate(counts.tolist()):
            candidate = Candidate(index, 0.5, tuple(row))
            first, second = on_cpu(candidate), on_gpu(candidate)
            assert second.images == first.images
            assert second.top1 == pytest.approx(first.top1, abs=0.01)
            assert second.loss == pytest.approx(first.loss, rel=0.02)
