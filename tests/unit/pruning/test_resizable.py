"""For any keep counts the small network runs and costs what was predicted.

It computes what the whole network computes with the dropped channels silenced.
"""

import functools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import ResizableNetwork, build_subnet
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from cacp_ray.pruning.verify import count_macs
from tests.unit.pruning.networks import NAMES, make


@functools.cache
def prepared(name):
    model, x = make(name)
    plan = make_plan(model, x[:1])
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    rng = np.random.default_rng(0)
    orders = [rng.permutation(group.num_channels) for group in plan.groups]
    return model, x, plan, tensors, orders


def cut(name, shares):
    model, _x, plan, tensors, orders = prepared(name)
    whole = plan.cost_model.num_channels
    counts = [max(1, round(share * n)) for share, n in zip(shares, whole, strict=False)]
    ordered = reorder_weights(plan, tensors, orders)
    return build_subnet(model, ordered | Cutter(plan)(ordered, counts)), counts


shares = st.lists(st.floats(0.0, 1.0), min_size=13, max_size=13)


@pytest.mark.parametrize("name", NAMES)
@given(shares=shares)
@settings(max_examples=15, deadline=None)
def test_predicted_cost_is_counted_cost(name, shares):
    small, counts = cut(name, shares)
    _, x, plan, _, _ = prepared(name)
    assert count_macs(small, x[:1]) == plan.macs(counts)
    assert sum(p.numel() for p in small.parameters()) == plan.params(counts)


@pytest.mark.parametrize("name", NAMES)
@given(shares=shares)
@settings(max_examples=15, deadline=None)
def test_cut_network_equals_masked_network(name, shares):
    small, counts = cut(name, shares)
    model, x, plan, tensors, orders = prepared(name)
    masked = {key: value.clone() for key, value in tensors.items()}
    # Silence a dropped channel where it is read: the input slices of its consumers.
    for (key, dim), axis in plan.axes.items():
        if dim == 1:
            for g, (order, count) in enumerate(zip(orders, counts, strict=True)):
                dropped = np.isin(axis.channel, order[count:]) & (axis.group == g)
                masked[key][:, torch.from_numpy(dropped)] = 0
    with torch.no_grad():
        expected = torch.func.functional_call(model, masked, x)
        assert torch.allclose(small.eval()(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_importance_order_alone_changes_nothing(name):
    model, x, plan, tensors, orders = prepared(name)
    reordered = build_subnet(model, reorder_weights(plan, tensors, orders))
    with torch.no_grad():
        assert torch.allclose(reordered(x), model(x), atol=1e-5)


def test_residual_layers_share_a_group_and_inner_layers_do_not():
    _, _, plan, _, _ = prepared("resnet")
    stream = next(g for g in plan.groups if g.name == "conv1")
    assert stream.is_residual
    assert "layer1.0.conv2.weight:0" in stream.members
    inner = next(g for g in plan.groups if g.name == "layer1.0.conv1")
    assert not inner.is_residual
    assert "layer1.0.conv2.weight:1" in inner.members


def test_depthwise_gate_and_its_input_share_a_group():
    _, _, plan, _, _ = prepared("depthwise")
    group = next(g for g in plan.groups if g.name == "expand")
    assert {"depth.weight:0", "excite.weight:0", "project.weight:1"} <= set(group.members)
    assert any(g.name == "squeeze" for g in plan.groups)


def test_leading_slices_are_views_of_the_ordered_weights():
    model, _, plan, tensors, orders = prepared("resnet")
    ordered = reorder_weights(plan, tensors, orders)
    small = Cutter(plan)(ordered, [max(1, g.num_channels // 2) for g in plan.groups])
    assert all(small[name].data_ptr() == ordered[name].data_ptr() for name in small)
    resizable = ResizableNetwork(model)
    assert resizable.load(small) is resizable.load(ordered)


def test_built_network_is_independent_and_trains():
    small, _ = cut("depthwise", [0.5] * 13)
    _, x, _, tensors, _ = prepared("depthwise")
    before = tensors["stem.weight"].clone()
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(small(x), torch.tensor([1, 2]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(tensors["stem.weight"], before)
