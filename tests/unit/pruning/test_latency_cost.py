import dataclasses
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.models.factory import build_model
from cacp_ray.pruning.cost import UNIT, describe_cost, describe_total
from cacp_ray.pruning.latency_cost import (
    Calibration,
    Grid,
    Layer,
    LayerShape,
    make_latency_cost,
    monotone,
)
from cacp_ray.pruning.planner import make_plan
from tests.toy import toy_cost_model, with_toy_latency

ONE = (1, 1)
CONV = LayerShape("conv", (3, 3), ONE, ONE, ONE, 1, ONE, False, True, 8, 8)
LINEAR = LayerShape("linear", ONE, ONE, (0, 0), ONE, 1, ONE, True, False, 1, 1)
MODELS = [
    with_toy_latency(toy_cost_model(groups, seed), seed)
    for groups, seed in ((1, 3), (6, 4), (9, 5))
]


def two_layers(calibration=Calibration()):  # noqa: B008
    """3 channels -> K of 8 -> 10 classes."""
    none, one = np.zeros(1), np.ones(1)
    layers = (Layer(CONV, none, 3.0, one, 0.0), Layer(LINEAR, one, 0.0, none, 10.0))
    grids = {
        CONV: Grid(np.array([3]), np.array([2, 4, 8]), np.array([[100], [300], [301]])),
        LINEAR: Grid(np.array([1, 8]), np.array([10]), np.array([[7, 70]])),
    }
    return make_latency_cost(layers, grids, calibration)


def test_a_table_of_two_layers():
    cost = two_layers()
    # Convolution: up to 2 channels cost 100, more cost 100 each, then 0.25. Linear: 9 for each.
    counts = np.array([[1], [2], [3], [4], [7], [8]])
    assert cost(counts).tolist() == [107, 116, 225, 334, 361, 371]
    assert cost.sum_layers([8]) == 371
    assert cost([8]).dtype == np.int64
    assert cost(counts[None]).shape == (1, 6)


def test_the_calibration_is_a_constant_and_a_scale():
    assert two_layers(Calibration(1000.0, 2.0))([8]) == 1000 + 2 * 371


def test_multiplications_cost_beyond_the_layers():
    # 3x3 convolution of 3 to 8 channels at 8x8, then 8 to 10.
    macs = 9 * 8 * 8 * 3 * 8 + 8 * 10
    assert two_layers().sum_macs([8]) == macs
    assert two_layers(Calibration(1000.0, 2.0, 0.5))([8]) == round(1000 + 2 * 371 + macs / 2)


@pytest.mark.parametrize("name", ["resnet20", "torchvision:mobilenet_v2"])
def test_multiplications_of_the_timed_layers_are_those_of_the_network(name):
    plan = make_plan(build_model(name, 10).eval(), torch.zeros(1, 3, 32, 32))
    layers = plan.cost_model.layers
    grid = Grid(np.array([1, 2000]), np.array([1, 2000]), np.ones((2, 2)))
    cost = make_latency_cost(layers, {layer.shape: grid for layer in layers}, Calibration())
    whole = plan.cost_model.num_channels
    for counts in (whole, np.maximum(whole // 2, 1)):
        assert cost.sum_macs(counts) == plan.macs(counts)


def test_widths_beyond_the_table_cost_as_its_last():
    assert two_layers()([100]) == two_layers()([8])


def test_the_surface_lies_between_the_running_maximum_and_minimum():
    assert monotone([[10, 30, 20, 40]]).tolist() == [[10, 25, 25, 40]]
    rising = [[1, 2], [3, 9]]
    assert monotone(rising).tolist() == rising


@given(st.integers(0, 2**32 - 1), st.integers(1, 8), st.integers(1, 8))
def test_the_surface_rises_both_ways_and_no_rising_one_is_nearer(seed, rows, columns):
    rng = np.random.default_rng(seed)
    times = rng.integers(0, 10**6, (rows, columns)).astype(float)
    found = monotone(times)
    assert (np.diff(found, axis=0) >= 0).all()
    assert (np.diff(found, axis=1) >= 0).all()
    other = np.sort(np.sort(times, axis=0), axis=1)
    assert np.abs(found - times).max() <= np.abs(other - times).max() + 1


@settings(deadline=None)
@given(st.sampled_from(MODELS), st.sampled_from(["latency", "both"]), st.data())
def test_the_cost_never_falls_when_a_count_grows(model, kind, data):
    cost = model.kind("latency" if kind == "latency" else {"latency": 1.0, "macs": 1.1})
    seed = data.draw(st.integers(0, 2**32 - 1))
    low, high = np.sort(
        np.random.default_rng(seed).integers(1, model.num_channels + 1, (2, 20, len(model.groups))),
        axis=0,
    )
    assert (cost(low) <= cost(high)).all()
    steps = np.minimum(low[:, None] + np.eye(low.shape[1], dtype=np.int64), model.num_channels)
    assert (cost(low)[:, None] <= cost(steps)).all()
    np.testing.assert_array_equal(cost(low), [cost(row) for row in low])


def test_a_pickled_cost_is_the_same():
    cost = MODELS[1].latency
    counts = np.random.default_rng(0).integers(1, 12, (50, 6))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cost))(counts), cost(counts))


def test_several_costs_are_the_largest_share_by_weight():
    model = MODELS[1]
    both = model.kind({"macs": 1.0, "latency": 1.25})
    assert both(model.num_channels) == UNIT
    counts = model.num_channels // 2
    shares = [
        int(model.kind(name)(counts)) / int(model.kind(name)(model.num_channels))
        for name in ("macs", "latency")
    ]
    expected = max(shares[0], shares[1] / 1.25)
    assert 0 <= both(counts) / UNIT - expected < 2 / UNIT


def test_costs_are_named_with_their_weights_and_units():
    assert describe_cost("macs") == "macs"
    assert describe_cost({"macs": 1.0, "latency": 1.2}) == "macs and latency / 1.2"
    assert describe_total("macs", 40_813_184) == "40,813,184 macs"
    assert describe_total("latency", 1_840_247) == "1.840 ms latency"


def test_a_layer_says_what_it_is():
    assert str(CONV) == "conv 3x3 stride 1 on 8x8"
    assert str(dataclasses.replace(CONV, groups=0)) == "conv 3x3 depthwise stride 1 on 8x8"
    assert str(LINEAR) == "linear"
