"""A user's own criteria: named by registration or import path, and checked for their scores."""

import numpy as np
import pytest
import torch

from cacp_ray.errors import ConfigError
from cacp_ray.pruning import criteria
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.criteria import (
    CRITERIA,
    KINDS,
    get_criterion,
    needs,
    rank_channels,
    register,
    score_channels,
)
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.surgery import all_tensors
from tests.unit.pruning.networks import make

HERE = "tests.unit.pruning.test_criteria_registry"


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(criteria, "CRITERIA", dict(CRITERIA))


@pytest.fixture(scope="module")
def network():
    model, x = make("plain")
    return model, make_plan(model, x[:1]), all_tensors(model), x


def last_first(plan, tensors, statistics, seed):
    return [list(range(group.num_channels)) for group in plan.groups]


def from_gates(plan, tensors, statistics, seed):
    return [gate.absolute for gate in statistics.gates]


last_first.reads = frozenset()


def test_a_function_is_named_by_its_import_path(network):
    model, plan, tensors, x = network
    name = f"{HERE}:last_first"
    assert get_criterion(name) is last_first
    assert needs(name) == frozenset()
    for group, order in zip(
        plan.groups, rank_channels(name, plan, tensors, Statistics(), 0), strict=True
    ):
        assert order.tolist() == list(range(group.num_channels))[::-1]
    name = f"{HERE}:from_gates"
    assert needs(name) == KINDS
    with pytest.raises(ConfigError, match="not collected"):
        score_channels(name, plan, tensors, Statistics(), 0)
    labels = torch.zeros(len(x), dtype=torch.int64)
    statistics = collect_statistics(
        model, plan, image_batches(x, labels), seed=0, kinds=needs(name)
    )
    scores = score_channels(name, plan, tensors, statistics, 0)
    assert all(np.array_equal(a, b.absolute) for a, b in zip(scores, statistics.gates, strict=True))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_package:f", "criterion 'no_such_package:f' cannot be imported"),
        (f"{HERE}:no_such", "cannot be imported"),
        (f"{HERE}:", "cannot be imported"),
        (f"{HERE}:HERE", "is a str, not a function"),
        ("fpmg", "did you mean fpgm"),
    ],
)
def test_names_that_lead_nowhere_are_refused_in_one_line(name, message):
    for use in (get_criterion, needs):
        with pytest.raises(ConfigError, match=message) as caught:
            use(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [list, tuple, np.array, torch.tensor, np.float32])
def test_scores_may_be_any_arrays_and_come_out_as_float64(network, kind):
    _, plan, tensors, _ = network
    register("own", lambda *_: [kind(range(group.num_channels)) for group in plan.groups])
    for group, score in zip(
        plan.groups, score_channels("own", plan, tensors, Statistics(), 0), strict=True
    ):
        assert score.dtype == np.float64
        assert score.tolist() == list(range(group.num_channels))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda scores: None, "returned a NoneType: .* 3 channel groups"),
        (lambda scores: [], "returned a list: .* 3 channel groups"),
        (lambda scores: scores[:2], "returned 2 arrays: .* 3 channel groups"),
        (lambda scores: [*scores, scores[0]], "returned 4 arrays"),
        (lambda scores: [scores[0], scores[1][:-1], scores[2]], r"group 3: .*\(11,\).* 12 finite"),
        (lambda scores: [scores[0], scores[1][None], scores[2]], r"group 3: .*\(1, 12\)"),
        (lambda scores: [scores[0], 1.0, scores[2]], r"group 3: .*\(\)"),
        (lambda scores: [*scores[:2], scores[2] * np.nan], "group 6: NaN or infinity"),
        (lambda scores: [scores[0] + np.inf, *scores[1:]], "group 0: NaN or infinity"),
        (lambda scores: [["high"] * 8, *scores[1:]], "group 0: no array of numbers"),
        (lambda scores: [[[1], [1, 2]], *scores[1:]], "group 0: no array of numbers"),
        (lambda scores: [torch.ones(8, requires_grad=True), *scores[1:]], "group 0: no array"),
    ],
)
def test_what_is_no_score_is_refused_with_the_criterion_and_the_group(network, spoil, message):
    _, plan, tensors, _ = network
    register("own", lambda *_: spoil([np.ones(group.num_channels) for group in plan.groups]))
    for use in (score_channels, rank_channels):
        with pytest.raises(ConfigError, match=f"criterion 'own'.*{message}") as caught:
            use("own", plan, tensors, Statistics(), 0)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("reads", [frozenset({"inputs", "labels"}), "labels"])
def test_statistics_that_do_not_exist_are_refused_at_once(reads, monkeypatch):
    with pytest.raises(ConfigError, match=r"reads labels: there are .* gates and inputs"):
        register("own", last_first, reads)
    assert "own" not in criteria.CRITERIA
    monkeypatch.setattr(last_first, "reads", reads)
    with pytest.raises(ConfigError, match="reads labels"):
        needs(f"{HERE}:last_first")


@pytest.mark.parametrize("reads", [frozenset(), frozenset({"gates"}), KINDS])
def test_needs_are_those_of_the_registration(reads):
    register("own", last_first, reads)
    assert needs("own") == reads
    register("own", last_first)
    assert needs("own") == frozenset()


@pytest.mark.parametrize(
    ("name", "step"), [("taylor", r"give plan\.calibrate a loss=$"), ("cap", r"plan\.calibrate$")]
)
def test_statistics_that_are_missing_are_refused_with_the_next_step(network, name, step):
    _, plan, tensors, _ = network
    with pytest.raises(ConfigError, match=step) as caught:
        score_channels(name, plan, tensors, Statistics(), 0)
    assert "images" not in str(caught.value)
