"""Scoring: the whole network scores its own accuracy, recovery helps, and nothing is written."""

import copy
import dataclasses

import numpy as np
import pytest
import torch

from cacp_ray.config import RunConfig, load_config
from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.network import FastNetwork
from cacp_ray.evaluation.preparation import Cutter
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.loading import STATISTICS_FILE, find_statistics, load_base, prepare_base
from cacp_ray.results import parse_rates
from cacp_ray.searching.budget import uniform
from cacp_ray.training.metrics import measure


@pytest.fixture(scope="module")
def base():
    whole = load_base(load_config(RunConfig, {}))
    return dataclasses.replace(whole, search=whole.search.take(200))


def make(base, recovery, criterion="l1"):
    config = load_config(
        RunConfig,
        {},
        [
            f"pruning.recovery={recovery}",
            f"pruning.criterion={criterion}",
            "pruning.calibration_images=100",
        ],
    )
    base = dataclasses.replace(base, calibration=base.calibration.take(100))
    return prepare_base(base, config)


def configure(*overrides):
    return load_config(RunConfig, {}, ["pruning.calibration_images=100", *overrides])


def count_passes(base):
    """The same base, and a list that grows by every forward pass of its network."""
    passes = []
    model = copy.deepcopy(base.model)
    model.register_forward_hook(lambda *_: passes.append(1))
    calibration = base.calibration.take(100)
    return dataclasses.replace(base, model=model, calibration=calibration), passes


def begin_run(folder):
    folder.mkdir()
    (folder / "config.yaml").touch()
    return folder


def same(left, right):
    return all(
        np.array_equal(x, y) for x, y in zip(left.orders, right.orders, strict=True)
    ) and all(
        np.array_equal(getattr(right.factors[name], field), value)
        for name, layer in left.factors.items()
        for field, value in vars(layer).items()
    )


@pytest.mark.parametrize("criterion", ["cap", "taylor"])
def test_a_second_command_reads_statistics_without_running_the_network(base, tmp_path, criterion):
    base, passes = count_passes(base)
    config = configure(f"pruning.criterion={criterion}")
    run_dir = begin_run(tmp_path / "run")
    first = find_statistics(base, config, run_dir)
    assert passes
    passes.clear()
    second = find_statistics(base, config, run_dir)
    assert not passes
    prepared = [prepare_base(base, config, None, found) for found in (first, second)]
    assert not passes
    assert same(*prepared)


def test_statistics_of_other_images_or_settings_are_collected_anew(base, tmp_path):
    base, passes = count_passes(base)
    config = configure()
    run_dir = begin_run(tmp_path / "run")
    find_statistics(base, config, run_dir)
    images = base.calibration.images.copy()
    images[7, 3, 3, 0] ^= 1
    changed = dataclasses.replace(base.calibration, images=images)
    for other_base, other_config in (
        (dataclasses.replace(base, calibration=changed), config),
        (dataclasses.replace(base, sha256="0" * 64), config),
        (base, configure("seed=1")),
        (base, configure("pruning.criterion=taylor")),
    ):
        passes.clear()
        find_statistics(other_base, other_config, run_dir)
        assert passes


def test_damaged_statistics_are_collected_anew_with_a_warning(base, tmp_path, caplog):
    base, passes = count_passes(base)
    config = configure()
    run_dir = begin_run(tmp_path / "run")
    first = find_statistics(base, config, run_dir)
    file = run_dir / STATISTICS_FILE
    file.write_bytes(file.read_bytes()[:1000])
    passes.clear()
    second = find_statistics(base, config, run_dir)
    assert passes
    assert len(caplog.records) == 1
    assert same(*(prepare_base(base, config, None, found) for found in (first, second)))
    passes.clear()
    find_statistics(base, config, run_dir)
    assert not passes


def test_nothing_is_written_before_the_run_has_begun(base, tmp_path):
    find_statistics(base, configure("pruning.criterion=l1", "pruning.recovery=bn"), tmp_path)
    assert not list(tmp_path.iterdir())


def score(base, prepared, recovery, counts):
    scorer = make_scorer(prepared, base.search, recovery=recovery, batch_size=100, dtype="float32")
    return scorer(Candidate(3, 0.5, tuple(counts)))


@pytest.mark.parametrize("recovery", ["none", "compensate"])
def test_nothing_cut_scores_as_the_base_network(base, recovery):
    counts = base.plan.cost_model.num_channels.tolist()
    found = score(base, make(base, recovery), recovery, counts)
    expected = measure(base.model, *base.search.tensors())
    assert found.index == 3
    assert found.images == 200
    assert found.top1 == pytest.approx(expected.top1, abs=0.0051)
    assert found.loss == pytest.approx(expected.loss, abs=0.02)


def test_recovery_repairs_a_cut_network(base):
    counts = uniform(base.budget, [0.6], np.ones(12))[0].tolist()
    top1 = {name: score(base, make(base, name), name, counts).top1 for name in ("none", "bn")}
    top1["compensate"] = score(base, make(base, "compensate", "cap"), "compensate", counts).top1
    assert top1["bn"] > top1["none"] + 0.1
    assert top1["compensate"] > top1["none"] + 0.3


def test_a_prefix_of_the_split_is_scored_alone(base):
    prepared = make(base, "none")
    scorer = make_scorer(prepared, base.search, recovery="none", batch_size=64, dtype="float32")
    counts = tuple(base.plan.cost_model.num_channels.tolist())
    found = scorer(Candidate(0, 1.0, counts, images=50))
    expected = measure(base.model, *base.search.take(50).tensors())
    assert (found.images, found.top1) == (50, pytest.approx(expected.top1))


@pytest.mark.parametrize("recovery", ["none", "bn", "compensate"])
def test_arrays_of_the_object_store_are_read_only_and_stay_so(base, recovery):
    prepared = make(base, recovery)
    before = {name: value.copy() for name, value in prepared.tensors.items()}
    for value in prepared.tensors.values():
        value.setflags(write=False)
    cutter = Cutter(prepared, recovery)
    small = uniform(base.budget, [0.4], np.ones(12))[0].tolist()
    first = {name: value.clone() for name, value in cutter.cut(small).items()}
    cutter.load(base.plan.cost_model.num_channels.tolist())
    again = cutter.cut(small)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert all(np.array_equal(before[name], prepared.tensors[name]) for name in before)


@pytest.mark.parametrize(
    ("text", "rates"),
    [("0.42", [0.42]), ("0.2:0.4:0.1", [0.2, 0.3, 0.4]), ("0.3:0.3:0.1", [0.3])],
)
def test_rates_are_read(text, rates):
    assert parse_rates(text) == pytest.approx(rates)


@pytest.mark.parametrize("text", ["x", "0", "1.2", "0.1:0.2", "0.5:0.2:0.1", "0.1:0.2:0"])
def test_bad_rates_are_refused(text):
    with pytest.raises(ConfigError, match=text):
        parse_rates(text)


def test_outputs_that_are_not_finite_are_a_failure(base):
    prepared = make(base, "none")
    tensors = prepared.tensors | {"fc.bias": np.full_like(prepared.tensors["fc.bias"], np.nan)}
    broken = dataclasses.replace(prepared, tensors=tensors)
    counts = base.plan.cost_model.num_channels.tolist()
    with pytest.raises(EvaluationError, match="not finite"):
        score(base, broken, "none", counts)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_halves_the_batch_once_and_says_so(base, monkeypatch, error):
    sizes = []
    load = FastNetwork.load

    def limited(self, keep_counts, batch_size=None):
        sizes.append(batch_size)
        if batch_size > most:
            raise error
        return load(self, keep_counts, batch_size)

    monkeypatch.setattr(FastNetwork, "load", limited)
    counts = tuple(base.plan.cost_model.num_channels.tolist())
    prepared = make(base, "none")
    scorer = make_scorer(prepared, base.search, recovery="none", batch_size=100, dtype="float32")
    most = 60
    found = scorer(Candidate(0, 1.0, counts))
    assert (found.status, found.images, sizes) == ("ok", 200, [100, 50])
    assert found.error == "out of memory: batches of 50 from now on"
    assert scorer(Candidate(1, 1.0, counts)).error == ""
    most = 30
    with pytest.raises(type(error)):
        scorer(Candidate(2, 1.0, counts))
    assert sizes == [100, 50, 50, 50]
