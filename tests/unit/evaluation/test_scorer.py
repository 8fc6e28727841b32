"""Scoring: the whole network scores its own accuracy, recovery helps, and nothing is written."""

import dataclasses

import numpy as np
import pytest

from cacp_ray.config import RunConfig, load_config
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import Cutter, make_scorer
from cacp_ray.loading import load_base, prepare_base
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
