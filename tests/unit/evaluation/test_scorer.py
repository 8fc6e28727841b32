"""Scoring: the whole network scores its own accuracy, recovery helps, and nothing is written."""

import copy
import dataclasses
import functools
import pickle

import numpy as np
import pytest
import torch

from cacp_ray.cli.options import parse_rates
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.network import FastNetwork
from cacp_ray.evaluation.preparation import CutNetwork
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.searching.budget import uniform
from cacp_ray.training.metrics import measure
from cacp_ray.workflows.setup import STATISTICS_FILE, Setup


@pytest.fixture(scope="module")
def base():
    whole = Setup.create(load_config(RunConfig, {}))
    return dataclasses.replace(whole, task=Classification(whole.search.take(200)))


@pytest.fixture(scope="module")
def make(base):
    """What all candidates share, for a recovery and a criterion; made once."""
    return functools.cache(functools.partial(prepare, base))


def prepare(base, recovery, criterion="l1"):
    config = load_config(
        RunConfig,
        {},
        [
            f"pruning.recovery={recovery}",
            f"pruning.criterion={criterion}",
            "pruning.calibration_images=100",
        ],
    )
    base = dataclasses.replace(base, config=config, calibration=base.calibration.take(100))
    return base.prepare().prepared


def configure(*overrides):
    return load_config(RunConfig, {}, ["pruning.calibration_images=100", *overrides])


def count_passes(base, config, run_dir):
    """The problem of a run, and a list that grows by every forward pass of its network."""
    passes = []
    model = copy.deepcopy(base.model)
    model.register_forward_hook(lambda *_: passes.append(1))
    calibration = base.calibration.take(100)
    changes = {"config": config, "run_dir": run_dir, "model": model}
    return dataclasses.replace(base, calibration=calibration, **changes), passes


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
    run_dir = begin_run(tmp_path / "run")
    setup, passes = count_passes(base, configure(f"pruning.criterion={criterion}"), run_dir)
    first = setup.find_statistics()
    assert passes
    passes.clear()
    second = setup.find_statistics()
    assert not passes
    prepared = [setup.prepare(statistics).prepared for statistics in (first, second)]
    assert not passes
    assert same(*prepared)


def test_statistics_of_other_images_or_settings_are_collected_anew(base, tmp_path):
    setup, passes = count_passes(base, configure(), begin_run(tmp_path / "run"))
    setup.find_statistics()
    images = setup.calibration.images.copy()
    images[7, 3, 3, 0] ^= 1
    changed = dataclasses.replace(setup.calibration, images=images)
    for change in (
        {"calibration": changed},
        {"sha256": "0" * 64},
        {"config": configure("seed=1")},
        {"config": configure("pruning.criterion=taylor")},
    ):
        passes.clear()
        dataclasses.replace(setup, **change).find_statistics()
        assert passes


def test_damaged_statistics_are_collected_anew_with_a_warning(base, tmp_path, caplog):
    run_dir = begin_run(tmp_path / "run")
    setup, passes = count_passes(base, configure(), run_dir)
    first = setup.find_statistics()
    file = run_dir / STATISTICS_FILE
    file.write_bytes(file.read_bytes()[:1000])
    passes.clear()
    second = setup.find_statistics()
    assert passes
    assert len(caplog.records) == 1
    assert same(*(setup.prepare(statistics).prepared for statistics in (first, second)))
    passes.clear()
    setup.find_statistics()
    assert not passes


def test_nothing_is_written_before_the_run_has_begun(base, tmp_path):
    config = configure("pruning.criterion=l1", "pruning.recovery=bn")
    dataclasses.replace(base, config=config, run_dir=tmp_path).find_statistics()
    assert not list(tmp_path.iterdir())


def score(base, prepared, recovery, counts):
    scorer = Scorer(prepared, base.search, recovery=recovery, batch_size=100, dtype="float32")
    return scorer(Candidate(0.5, tuple(counts), index=3))


def test_a_scorer_travels_to_another_process(make, base):
    split = base.search.take(100)
    scorer = Scorer(make("none"), split, recovery="none", dtype="float32")
    candidate = Candidate(0.5, tuple(base.plan.cost_model.num_channels.tolist()))
    again = pickle.loads(pickle.dumps(scorer))
    assert again(candidate).score == scorer(candidate).score


@pytest.mark.parametrize("recovery", ["none", "compensate"])
def test_nothing_cut_scores_as_the_base_network(make, base, recovery):
    counts = base.plan.cost_model.num_channels.tolist()
    measurement = score(base, make(recovery), recovery, counts)
    expected = measure(base.model, *base.search.tensors())
    assert measurement.index == 3
    assert measurement.images == 200
    assert measurement.score == pytest.approx(expected.top1, abs=0.0051)
    assert measurement.loss == pytest.approx(expected.loss, abs=0.02)


def test_recovery_repairs_a_cut_network(make, base):
    counts = uniform(base.budget, [0.6], np.ones(12))[0].tolist()
    top1 = {name: score(base, make(name), name, counts).score for name in ("none", "bn")}
    top1["compensate"] = score(base, make("compensate", "cap"), "compensate", counts).score
    assert top1["bn"] > top1["none"] + 0.1
    assert top1["compensate"] > top1["none"] + 0.3


def test_a_prefix_of_the_split_is_scored_alone(make, base):
    prepared = make("none")
    scorer = Scorer(prepared, base.search, recovery="none", batch_size=64, dtype="float32")
    counts = tuple(base.plan.cost_model.num_channels.tolist())
    measurement = scorer(Candidate(1.0, counts, index=0, images=50))
    expected = measure(base.model, *base.search.take(50).tensors())
    assert (measurement.images, measurement.score) == (50, pytest.approx(expected.top1))


@pytest.mark.parametrize("recovery", ["none", "bn", "compensate"])
def test_arrays_of_the_object_store_are_read_only_and_stay_so(make, base, recovery):
    prepared = make(recovery)
    before = {name: value.copy() for name, value in prepared.tensors.items()}
    for value in prepared.tensors.values():
        value.setflags(write=False)
    cut_network = CutNetwork(prepared, recovery)
    small = uniform(base.budget, [0.4], np.ones(12))[0].tolist()
    first = {name: value.clone() for name, value in cut_network.cut(small).items()}
    cut_network.load(base.plan.cost_model.num_channels.tolist())
    again = cut_network.cut(small)
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


def test_outputs_that_are_not_finite_are_a_failure(make, base):
    prepared = make("none")
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
def test_out_of_memory_halves_the_batch_once_and_says_so(make, base, monkeypatch, error):
    sizes = []
    load = FastNetwork.load

    def limited(self, keep_counts, batch_size=None):
        sizes.append(batch_size)
        if batch_size > most:
            raise error
        return load(self, keep_counts, batch_size)

    monkeypatch.setattr(FastNetwork, "load", limited)
    counts = tuple(base.plan.cost_model.num_channels.tolist())
    prepared = make("none")
    scorer = Scorer(prepared, base.search, recovery="none", batch_size=100, dtype="float32")
    most = 60
    measurement = scorer(Candidate(1.0, counts, index=0))
    assert (measurement.status, measurement.images, sizes) == ("ok", 200, [100, 50])
    assert measurement.error == "out of memory: batches of 50 from now on"
    assert scorer(Candidate(1.0, counts, index=1)).error == ""
    most = 30
    with pytest.raises(type(error)):
        scorer(Candidate(1.0, counts, index=2))
    assert sizes == [100, 50, 50, 50]
