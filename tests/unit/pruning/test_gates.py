"""Gates on channels: closed ones are cuts."""

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors, reorder_weights
from tests.unit.pruning.networks import NAMES, make


def open_network(name):
    model, x = make(name)
    plan = make_plan(model, x[:1])
    rng = np.random.default_rng(3)
    orders = [rng.permutation(group.num_channels) for group in plan.groups]
    counts = [int(rng.integers(1, group.num_channels + 1)) for group in plan.groups]
    masks = []
    for order, count in zip(orders, counts, strict=True):
        mask = torch.zeros(len(order))
        mask[torch.as_tensor(order[:count])] = 1
        masks.append(mask)
    return model, x, plan, orders, counts, torch.cat(masks)


@pytest.mark.parametrize("name", NAMES)
def test_closed_gates_are_cut_channels(name):
    model, x, plan, orders, counts, masks = open_network(name)
    small = build_subnet(
        model, Cutter(plan)(reorder_weights(plan, all_tensors(model), orders), counts)
    )
    gates = ChannelGates(model, plan)
    gates.values = masks
    with torch.no_grad():
        assert torch.allclose(model(x), small.eval()(x), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_folded_gates_answer_alike_and_leave_no_hook(name):
    model, x, plan, *_ = open_network(name)
    gates = ChannelGates(model, plan)
    gates.values = torch.rand(gates.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gated = model(x)
        gates.fold()
        gates.remove()
        assert torch.allclose(model(x), gated, atol=1e-5)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_gates_of_each_image_are_its_own(name):
    model, x, plan, *_ = open_network(name)
    gates = ChannelGates(model, plan)
    values = torch.rand(len(x), gates.size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        gates.values = values
        together = model(x)
        for image, own, output in zip(x, values, together, strict=True):
            gates.values = own
            assert torch.allclose(model(image[None])[0], output, atol=1e-5)


def test_open_gates_change_nothing_and_split_by_group():
    model, x = make("concat")
    plan = make_plan(model, x[:1])
    with torch.no_grad():
        whole = model(x)
        gates = ChannelGates(model, plan)
        assert torch.equal(model(x), whole)
    parts = gates.split(torch.arange(gates.size))
    assert [len(part) for part in parts] == [group.num_channels for group in plan.groups]
    assert torch.equal(torch.cat(parts), torch.arange(gates.size))


def test_positions_of_no_group_stay_open():
    class Joined(nn.Module):
        """A layer that reads channels of a group beside the image itself, which always stays."""

        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.second = nn.Conv2d(7, 5, 1)

        def forward(self, x):
            joined = torch.cat([self.first(x).relu(), x], 1)
            return self.second(joined).mean((2, 3))

    torch.manual_seed(0)
    model, x = Joined().eval(), torch.randn(2, 3, 8, 8)
    plan = make_plan(model, x[:1])
    gates = ChannelGates(model, plan)
    gates.values = torch.zeros(gates.size)
    with torch.no_grad():
        weight = model.second.weight[:, 4:]
        image_alone = nn.functional.conv2d(x, weight, model.second.bias).mean((2, 3))
        assert torch.allclose(model(x), image_alone, atol=1e-5)
