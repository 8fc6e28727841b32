"""CHEX: rounds of pruning and growing."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.pruning.planner import make_plan
from cacp_ray.searching.widths.chex import REGROWN, Chex, measure_scales, score_leverage
from cacp_ray.searching.widths.memory import ChannelMemory
from cacp_ray.searching.widths.method import ROUNDS
from tests.unit.searching.widths.common import open_small


def chain(filters):
    """A network whose first layer has these filters (C, 2), with BN scales of one."""
    first = nn.Conv2d(2, len(filters), 1, bias=False)
    second = nn.Conv2d(len(filters), 3, 1, bias=False)
    with torch.no_grad():
        first.weight.copy_(torch.tensor(filters)[:, :, None, None])
    norms = nn.BatchNorm2d(len(filters)), nn.BatchNorm2d(3)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)]
    model = nn.Sequential(first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), *head).eval()
    return model, make_plan(model, torch.randn(1, 2, 4, 4))


def test_leverage_is_the_length_of_a_channel_in_the_leading_directions():
    # Filters along the first axis of length 3, and along the second of lengths 2 and 1: the leading
    # direction belongs to the first channel alone, the next to the others as 2 : 1.
    model, plan = chain([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    one = score_leverage(plan, model.state_dict(), np.array([1, 3]))[0]
    two = score_leverage(plan, model.state_dict(), np.array([2, 3]))[0]
    assert one == pytest.approx([1, 0, 0], abs=1e-6)
    assert two == pytest.approx([1, 2 / math.sqrt(5), 1 / math.sqrt(5)])


def test_a_group_with_fewer_numbers_a_filter_than_kept_channels_takes_l1_norms():
    model, plan = chain([[3.0, 0.0], [0.0, 2.0], [0.0, 1.0]])
    assert score_leverage(plan, model.state_dict(), np.array([3, 3]))[0] == pytest.approx([3, 2, 1])


def test_scales_of_a_residual_stream_add_like_deviations():
    model, _, problem = open_small("resnet")
    scales = measure_scales(problem.plan, model)
    stream = next(g for g, group in enumerate(problem.plan.groups) if group.is_residual)
    producers = problem.plan.groups[stream].producers
    norms = {
        layer: model.get_submodule(layer.replace("conv", "bn")).weight.detach().numpy()
        for layer in producers
    }
    assert len(norms) > 1
    assert scales[stream] == pytest.approx(np.sqrt(sum(w**2 for w in norms.values())))


def test_the_share_that_grows_again_falls_as_a_cosine_to_none():
    model, _, problem = open_small("resnet", steps=ROUNDS)
    chex = Chex(problem, model)
    shares = []
    for _ in range(ROUNDS):
        active = chex.state_dict()["active"].numpy()
        counts = chex.finish()[0].keep_counts
        gone = problem.budget.num_channels.sum() - counts.sum()
        shares.append((active.sum() - counts.sum()) / gone)
        chex.after_step()
    expected = [REGROWN / 2 * (1 + math.cos(math.pi * r / (ROUNDS - 1))) for r in range(ROUNDS)]
    assert shares == pytest.approx(expected, abs=0.05)  # whole channels of small groups
    assert shares[-1] == 0


def test_channels_grow_again_with_the_weights_and_statistics_that_they_had():
    model, _, problem = open_small("resnet")
    memory = ChannelMemory(model, problem.plan)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    masks = [torch.arange(group.num_channels) == 0 for group in problem.plan.groups]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(1.0)
    memory.restore(masks)
    after = model.state_dict()
    for (name, dim), axis in problem.plan.axes.items():
        back = torch.zeros(len(axis.group), dtype=torch.bool)
        for group in axis.groups:
            back |= torch.as_tensor((axis.group == group) & (axis.channel == 0))
        assert torch.equal(after[name].movedim(dim, 0)[back], before[name].movedim(dim, 0)[back]), (
            name
        )
    assert torch.equal(after["fc.bias"], before["fc.bias"] + 1)  # belongs to no channel


def test_widths_follow_batch_norm_scales():
    model, _, problem = open_small("plain")
    with torch.no_grad():
        model[4].weight.fill_(1e-3)  # the second group
    shares = Chex(problem, model).finish()[0].keep_counts / problem.budget.num_channels
    assert shares[1] < 0.5 < min(shares[0], shares[2])


def test_every_channel_that_opens_is_as_it_was_when_it_closed(monkeypatch):
    model, _, problem = open_small("resnet", steps=ROUNDS)
    chex = Chex(problem, model)
    restored = []
    monkeypatch.setattr(chex._memory, "restore", lambda masks: restored.append(torch.cat(masks)))
    for _ in range(ROUNDS - 1):
        before = chex.state_dict()["active"].bool()
        chex.after_step()
        assert torch.equal(restored[-1], chex.state_dict()["active"].bool() & ~before)
