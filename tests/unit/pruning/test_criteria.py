"""Criteria against their definitions, and the laws that every criterion obeys."""

import dataclasses
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.criteria import CRITERIA, get_criterion, needs, rank_channels
from cacp_ray.pruning.criteria import score_channels as score
from cacp_ray.pruning.criteria.common import slices
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.statistics import (
    GateGradients,
    InputMoments,
    Statistics,
    collect_statistics,
)
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from cacp_ray.pruning.verify import count_macs
from tests.unit.pruning.networks import NAMES, make

WEIGHT_CRITERIA = [name for name in CRITERIA if not needs(name) and name != "random"]
BUILT_IN = tuple(CRITERIA)


class Decoder(nn.Module):
    """Transposed, grouped and depthwise convolutions."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.lanes = nn.Conv2d(6, 8, 3, padding=1, groups=2, bias=False)
        self.up_bias = nn.ConvTranspose2d(8, 6, 3, padding=1)
        self.depth = nn.ConvTranspose2d(6, 6, 3, padding=1, groups=6)
        self.head = nn.Conv2d(6, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lanes(self.norm(self.up(self.down(x).relu())).relu()).relu()
        return self.head(self.depth(self.up_bias(x).relu()).relu()).mean((2, 3))


class Mobile(nn.Module):
    """MobileNetV3-like: strided depthwise convolution, SE gate, hard-swish, a flattened map."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8))
        self.expand = nn.Sequential(nn.Conv2d(8, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.depth = nn.Conv2d(16, 16, 3, stride=2, padding=1, groups=16, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.squeeze, self.excite = nn.Linear(16, 4), nn.Linear(4, 16)
        self.project = nn.Sequential(nn.Conv2d(16, 12, 1, bias=False), nn.BatchNorm2d(12))
        self.head = nn.Linear(12 * 16, num_classes)
        self.act = nn.Hardswish(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.expand(self.act(self.stem(x))))
        x = self.act(self.norm(self.depth(x)))
        gate = functional.hardsigmoid(self.excite(self.squeeze(x.mean((2, 3))).relu()))
        return self.head(self.project(x * gate[:, :, None, None]).flatten(1))


OTHERS = {"decoder": Decoder, "mobile": Mobile}


@cache
def load(name):
    """A network: model, plan, state dict and images."""
    if name in NAMES:
        model, x = make(name)
    else:
        torch.manual_seed(0)
        model, x = OTHERS[name]().eval(), torch.randn(2, 3, 8, 8)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
    plan = make_plan(model, x[:1])
    return model, plan, {key: value.detach() for key, value in model.state_dict().items()}, x


def invent(plan, tensors, seed=0, is_dead=False):
    """Statistics of random correlated inputs and random gates; all zero where `is_dead`."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for consumer in plan.consumers:
        size = tensors[consumer.weight][0].numel()
        data = rng.normal(size=(2 * size, size)) @ rng.normal(size=(size, size))
        data = (data * rng.uniform(0.1, 2, size)) * (not is_dead)
        inputs[consumer.weight] = InputMoments(np.zeros(size), data.T @ data / len(data))
    gates = []
    for group in plan.groups:
        draws = rng.normal(size=(20, group.num_channels)) * (not is_dead)
        gates.append(GateGradients(np.abs(draws).mean(0), np.square(draws).mean(0)))
    return Statistics(inputs, tuple(gates))


# ---- laws of all criteria


@pytest.mark.parametrize("is_dead", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_every_criterion_gives_finite_scores_and_permutations(name, is_dead):
    _, plan, tensors, _ = load(name)
    if is_dead:
        tensors = {key: torch.zeros_like(value) for key, value in tensors.items()}
    statistics = invent(plan, tensors, is_dead=is_dead)
    for criterion in BUILT_IN:
        scores = score(criterion, plan, tensors, statistics, 0)
        orders = rank_channels(criterion, plan, tensors, statistics, 0)
        assert len(scores) == len(orders) == len(plan.groups)
        for group, values, order in zip(plan.groups, scores, orders, strict=True):
            assert values.shape == (group.num_channels,)
            assert values.dtype == np.float64
            assert np.isfinite(values).all(), criterion
            assert sorted(order.tolist()) == list(range(group.num_channels))
            assert (np.diff(values[order]) <= 0).all()


@pytest.mark.parametrize("name", ["plain", "resnet", "concat"])
def test_channels_that_never_change_explain_nothing(name):
    _, plan, tensors, _ = load(name)
    statistics = invent(plan, tensors)
    dead = 1
    for consumer in plan.consumers:
        axis, moments = plan.axes[consumer.weight, 1], statistics.inputs[consumer.weight]
        alive = np.repeat(axis.group != dead, len(moments.covariance) // len(axis.group))
        covariance = moments.covariance * np.outer(alive, alive)
        statistics.inputs[consumer.weight] = InputMoments(moments.mean, covariance)
    scores = score("cap", plan, tensors, statistics, 0)
    least = min(values.min() for g, values in enumerate(scores) if g != dead)
    assert scores[dead].max() < 1e-6
    assert scores[dead].max() < least


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_scores_follow_the_channels_when_they_change_places(name):
    _, plan, tensors, _ = load(name)
    rng = np.random.default_rng(3)
    orders = [rng.permutation(group.num_channels) for group in plan.groups]
    moved = reorder_weights(plan, tensors, orders)
    statistics = invent(plan, tensors)
    elsewhere = {}
    for consumer in plan.consumers:
        taps = tensors[consumer.weight][0, 0].numel()
        index = plan.axes[consumer.weight, 1].reordered(orders)
        rows = (index[:, None] * taps + np.arange(taps)).ravel()
        old = statistics.inputs[consumer.weight]
        elsewhere[consumer.weight] = InputMoments(old.mean, old.covariance[np.ix_(rows, rows)])
    gates = tuple(
        GateGradients(gate.absolute[order], gate.square[order])
        for gate, order in zip(statistics.gates, orders, strict=True)
    )
    for criterion in set(BUILT_IN) - {"random"}:
        here = score(criterion, plan, tensors, statistics, 0)
        there = score(criterion, plan, moved, Statistics(elsewhere, gates), 0)
        for values, order, new in zip(here, orders, there, strict=True):
            assert np.allclose(new, values[order], rtol=1e-6, atol=1e-10), criterion


def test_random_order_depends_on_the_seed_alone():
    _, plan, tensors, _ = load("resnet")

    def orders(seed):
        return np.concatenate(rank_channels("random", plan, tensors, Statistics(), seed))

    assert (orders(1) == orders(1)).all()
    assert (orders(1) != orders(2)).any()


def test_unknown_names_and_missing_statistics_are_refused_in_one_line():
    _, plan, tensors, _ = load("plain")
    with pytest.raises(ConfigError, match="did you mean group_fisher"):
        get_criterion("group_fischer")
    with pytest.raises(ConfigError, match="unknown criterion"):
        needs("nothing")
    for criterion, kind in (("cap", "inputs"), ("taylor", "gates"), ("group_fisher", "gates")):
        assert needs(criterion) == {kind}
        with pytest.raises(ConfigError, match=f"{criterion}.*{kind}"):
            score(criterion, plan, tensors, Statistics(), 0)


# ---- criteria of the weights


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-3, 1e3), st.sampled_from(["l1", "l2", "fpgm"]))
def test_scaling_a_layer_changes_no_order(factor, criterion):
    _, plan, tensors, _ = load("plain")  # every group has one layer
    name = "3.weight"
    before = rank_channels(criterion, plan, tensors, Statistics(), 0)
    after = rank_channels(
        criterion, plan, tensors | {name: tensors[name] * factor}, Statistics(), 0
    )
    assert all((a == b).all() for a, b in zip(before, after, strict=True))


@settings(max_examples=15, deadline=None)
@given(st.floats(1e-2, 1e2))
def test_fpgm_weighs_coupled_layers_alike(factor):
    _, plan, tensors, _ = load("resnet")
    group = next(g for g, group in enumerate(plan.groups) if group.is_residual)
    name = next(m[:-2] for m in plan.groups[group].members if m.endswith("conv2.weight:0"))
    before = score("fpgm", plan, tensors, Statistics(), 0)[group]
    scaled = tensors | {name: tensors[name] * factor}
    assert np.allclose(score("fpgm", plan, scaled, Statistics(), 0)[group], before)


@settings(max_examples=15, deadline=None)
@given(st.integers(9, 15), st.integers(0, 10**6))
def test_fpgm_puts_the_filter_that_most_others_repeat_last(copies, seed):
    # A point that holds at least half of the mass is the geometric median.
    _, plan, tensors, _ = load("plain")
    rng = np.random.default_rng(seed)
    same = rng.permutation(16)[:copies]
    weight = tensors["6.weight"].clone()
    weight[same] = weight[same[:1]].clone()
    order = rank_channels("fpgm", plan, tensors | {"6.weight": weight}, Statistics(), 0)[2]
    assert set(order[-copies:].tolist()) == set(same.tolist())


@pytest.mark.parametrize("name", [*NAMES, *OTHERS])
def test_larger_filters_raise_only_their_own_channel(name):
    _, plan, tensors, _ = load(name)
    for g, group in enumerate(plan.groups):
        channel = group.num_channels // 2
        larger = dict(tensors)
        for (key, dim), axis in plan.axes.items():
            makes = any(a is axis for _, a, is_filter in slices(plan, tensors) if is_filter)
            if makes:
                at = torch.from_numpy((axis.group == g) & (axis.channel == channel))
                scale = 1 + 99 * at.double().reshape(
                    [-1 if d == dim else 1 for d in range(4)][: tensors[key].ndim]
                )
                larger[key] = (larger[key] * scale).float()
        for criterion in ("l1", "l2"):
            before = score(criterion, plan, tensors, Statistics(), 0)[g]
            after = score(criterion, plan, larger, Statistics(), 0)[g]
            assert after[channel] == pytest.approx(100 * before[channel], rel=1e-5)
            rest = np.arange(group.num_channels) != channel
            assert np.allclose(after[rest], before[rest], rtol=1e-5)


def test_filters_of_transposed_and_grouped_convolutions_are_their_outputs():
    _, plan, tensors, _ = load("decoder")
    scores = dict(
        zip([g.name for g in plan.groups], score("l1", plan, tensors, Statistics(), 0), strict=True)
    )
    weights = {key: value.abs().double() for key, value in tensors.items()}
    # Both parts of `lanes` keep the same lanes: outputs c and c + 4, inputs c and c + 3.
    up = weights["up.weight"].sum((0, 2, 3))
    assert np.allclose(scores["up"], up[:3] + up[3:])
    lanes = weights["lanes.weight"].sum((1, 2, 3))
    assert np.allclose(scores["lanes"], lanes[:4] + lanes[4:])
    chain = weights["up_bias.weight"].sum((0, 2, 3)) + weights["depth.weight"].sum((1, 2, 3))
    assert np.allclose(scores["up_bias"], chain)


def test_bn_scale_is_the_mean_gamma_and_falls_back_to_scaled_l1():
    _, plan, tensors, _ = load("mobile")
    scores = dict(
        zip(
            [g.name for g in plan.groups],
            score("bn_scale", plan, tensors, Statistics(), 0),
            strict=True,
        )
    )
    gammas = tensors["expand.1.weight"].double(), tensors["norm.weight"].double()
    assert np.allclose(scores["expand.0"], (gammas[0].abs() + gammas[1].abs()) / 2)
    others = np.concatenate([value for name, value in scores.items() if name != "squeeze"])
    l1 = tensors["squeeze.weight"].abs().sum(1).double()
    assert np.allclose(scores["squeeze"], l1 / l1.mean() * others.mean(), rtol=1e-5)


@pytest.mark.parametrize("criterion", ["bn_scale", "l1", "fpgm", "taylor"])
def test_a_group_whose_channels_are_all_dead_is_worth_nothing(criterion):
    """Training towards sparsity leaves such groups; they must not pass for average ones."""
    model, x = make("resnet")
    first, parameters = make_plan(model, x).groups[0], dict(model.named_parameters())
    with torch.no_grad():
        for member in first.members:
            name, _, dim = member.rpartition(":")
            if dim == "0" and name in parameters:
                parameters[name].zero_()
    plan = make_plan(model, x)
    tensors = dict(model.state_dict())
    torch.manual_seed(0)
    images, labels = torch.rand(16, *x.shape[1:]), torch.arange(16) % 2
    statistics = collect_statistics(
        model, plan, image_batches(images, labels), seed=0, kinds={"inputs", "gates"}
    )
    dead, *others = score(criterion, plan, tensors, statistics, 0)
    assert dead.max() <= 1e-6 * max(other.max() for other in others)


def test_cpmc_weighs_all_that_vanishes_with_a_channel():
    model, plan, tensors, _ = load("plain")
    whole = plan.cost_model.num_channels
    found = score("cpmc", plan, tensors, Statistics(), 0)
    for g, group in enumerate(plan.groups):
        weight = []
        for channel in range(group.num_channels):
            order = [np.arange(other.num_channels) for other in plan.groups]
            order[g] = np.array([*np.delete(order[g], channel), channel])
            ordered = reorder_weights(plan, tensors, order)
            counts = (whole - np.eye(len(whole), dtype=int)[g]).tolist()
            small = build_subnet(model, ordered | Cutter(plan)(ordered, counts))
            before = sum(p.detach().abs().sum() for p in model.parameters() if p.ndim > 1)
            after = sum(p.detach().abs().sum() for p in small.parameters() if p.ndim > 1)
            weight.append(float(before - after))
        assert np.allclose(found[g], np.array(weight) / np.mean(weight), atol=1e-4)


# ---- criteria of gradients


def test_taylor_and_group_fisher_are_gradients_by_masks_image_by_image():
    model, plan, tensors, _ = load("plain")
    torch.manual_seed(2)
    x, y = torch.randn(6, 3, 8, 8), torch.randint(5, (6,))
    gradients = [[], [], []]
    for image, label in zip(x, y, strict=True):
        masks = [torch.ones(group.num_channels, requires_grad=True) for group in plan.groups]
        z = image[None]
        for index, layer in enumerate(model):
            z = layer(z)
            if index in (2, 5, 8):  # after each ReLU
                z = z * masks[index // 3][:, None, None]
        loss = functional.cross_entropy(z, label[None])
        for g, gradient in enumerate(torch.autograd.grad(loss, masks)):
            gradients[g].append(gradient.double().numpy())
    statistics = collect_statistics(
        model, plan, image_batches(x, y), seed=0, kinds=frozenset({"gates"})
    )
    taylor = score("taylor", plan, tensors, statistics, 0)
    fisher = score("group_fisher", plan, tensors, statistics, 0)
    whole = plan.cost_model.num_channels.tolist()
    for g, draws in enumerate(map(np.array, gradients)):
        first = np.abs(draws).mean(0)
        assert np.allclose(taylor[g], first / np.linalg.norm(first), rtol=1e-4)
        counts = [count - (g == h) for h, count in enumerate(whole)]
        small = build_subnet(model, tensors | Cutter(plan)(tensors, counts))
        freed = count_macs(model, x[:1]) - count_macs(small, x[:1])
        assert np.allclose(fisher[g], np.square(draws).mean(0) / freed, rtol=1e-4)


def test_groups_without_gates_take_the_l1_order_at_the_mean_of_the_others():
    _, plan, tensors, _ = load("plain")
    gates = list(invent(plan, tensors).gates)
    gates[1] = GateGradients(np.zeros(12), np.zeros(12))
    others = [c for c in plan.consumers if 1 not in plan.axes[c.weight, 1].groups]
    plan = dataclasses.replace(plan, consumers=tuple(others))
    l1 = rank_channels("l1", plan, tensors, Statistics(), 0)
    for criterion in ("taylor", "group_fisher"):
        scores = score(criterion, plan, tensors, Statistics(gates=tuple(gates)), 0)
        assert (np.argsort(-scores[1], kind="stable") == l1[1]).all()
        assert scores[1].mean() == pytest.approx(np.concatenate([scores[0], scores[2]]).mean())


# ---- the page


def test_the_page_names_every_criterion_and_its_own_criterion_ranks():
    page = (Path(__file__).parents[3] / "docs" / "criteria.md").read_text()
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(BUILT_IN)
    for name in BUILT_IN:
        [row] = re.findall(rf"^\| `{name}` \|([^|]*)\|", page, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == needs(name)
    [block] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    known = dict(CRITERIA)
    try:
        space = {}
        exec(block, space)
        [new] = set(CRITERIA) - set(known)
        _, plan, tensors, _ = load("depthwise")
        orders = rank_channels(new, plan, tensors, invent(plan, tensors), 0)
        for group, order in zip(plan.groups, orders, strict=True):
            assert sorted(order.tolist()) == list(range(group.num_channels))
    finally:
        CRITERIA.clear()
        CRITERIA.update(known)
