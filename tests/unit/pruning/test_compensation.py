"""Compensation and order against their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.pruning.compensation import Compensator, make_factors
from cacp_ray.pruning.criteria import CRITERIA, rank_channels
from cacp_ray.pruning.plan import make_plan
from cacp_ray.pruning.recovery import recalibrate_bn
from cacp_ray.pruning.statistics import RIDGE, Statistics, collect_statistics, sample_patches
from cacp_ray.pruning.surgery import Skeleton, build_subnet, reorder_weights
from tests.unit.pruning.networks import NAMES, make


def prepare(name, images=None, criterion="cap"):
    model, x = make(name)
    x = x if images is None else images
    plan = make_plan(model, x[:1])
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    statistics = collect_statistics(model, plan, x, seed=0, positions=10_000)
    orders = rank_channels(criterion, plan, tensors, statistics, 0)
    ordered = reorder_weights(plan, tensors, orders)
    factors = make_factors(plan, ordered, statistics.inputs, orders)
    return model, plan, tensors, statistics.inputs, orders, ordered, factors


@pytest.mark.parametrize("name", NAMES)
def test_nothing_cut_changes_nothing(name):
    torch.manual_seed(1)
    x = torch.randn(16, *make(name)[1].shape[1:])
    model, plan, _, _, _, ordered, factors = prepare(name, x)
    counts = plan.cost_model.num_channels.tolist()
    whole = build_subnet(model, ordered | Compensator(plan, ordered, factors)(counts))
    with torch.no_grad():
        assert torch.allclose(whole(x), model(x), atol=1e-3, rtol=1e-3)


def test_weights_and_intercept_equal_least_squares_on_the_data():
    torch.manual_seed(1)
    x = torch.randn(64, 3, 8, 8)
    model, plan, _, _, orders, ordered, factors = prepare("concat", x)
    counts = [4, 3, 8]
    names = [group.name for group in plan.groups]
    assert names == ["left", "right", "mix"]
    small = Compensator(plan, ordered, factors)(counts)
    # The definition: regress the outputs of `mix` on the kept inputs, with intercept.
    with torch.no_grad():
        inputs = model.norm(torch.cat([model.left(x), model.right(x)], 1)).relu()
        rows = sample_patches(model.mix, inputs, 10_000, torch.Generator().manual_seed(0))
    kept = [c for c in range(10) if c in orders[0][:4] or c - 6 in orders[1][:3]]
    columns = np.array([c * 9 + k for c in kept for k in range(9)])
    targets = rows.numpy() @ model.mix.weight.detach().flatten(1).numpy().T
    design = np.column_stack([rows.numpy()[:, columns], np.ones(len(rows))])
    solution = np.linalg.lstsq(design.astype(np.float64), targets, rcond=None)[0]
    fitted = design @ solution
    # The same prediction from our weight, its inputs in importance order.
    place = {c: i for i, c in enumerate([*orders[0][:4], *(orders[1][:3] + 6)])}
    ours = small["mix.weight"].flatten(2)[:, [place[c] for c in kept]].flatten(1)
    shift = small["mix.bias"] - model.mix.bias.detach()[torch.from_numpy(orders[2])]
    predicted = rows[:, columns] @ ours.T + shift
    error = np.abs(predicted.numpy() - fitted[:, orders[2]]).max()
    assert error < 5e-3 * np.abs(fitted).max()


def test_outputs_before_bn_keep_mean_and_variance():
    torch.manual_seed(1)
    x = torch.randn(200, 3, 16, 16)
    model, plan, _, _, orders, ordered, factors = prepare("resnet", x)
    counts = [
        max(1, n // 2) if not g.is_residual else n
        for g, n in zip(plan.groups, plan.cost_model.num_channels, strict=True)
    ]
    small = build_subnet(model, ordered | Compensator(plan, ordered, factors)(counts))
    seen = {}
    for tag, net in (("whole", model), ("small", small)):
        net.layer1[0].bn2.register_forward_pre_hook(
            lambda module, args, tag=tag: seen.__setitem__(
                tag, (args[0], module.running_mean.clone())
            )
        )
        with torch.no_grad():
            net(x)
    stream = torch.from_numpy(orders[0])
    whole = (seen["whole"][0] - seen["whole"][1][:, None, None])[:, stream]
    small_out = seen["small"][0] - seen["small"][1][:, None, None]
    dims = (0, 2, 3)
    assert torch.allclose(small_out.mean(dims), whole.mean(dims), atol=2e-2)
    assert torch.allclose(small_out.var(dims), whole.var(dims), rtol=3e-2)


def test_moments_are_mean_and_covariance_of_the_unfolded_input():
    torch.manual_seed(1)
    x = torch.randn(8, 3, 8, 8)
    model, _plan, _, moments, *_ = prepare("concat", x)
    with torch.no_grad():
        inputs = model.norm(torch.cat([model.left(x), model.right(x)], 1)).relu()
    rows = nn.functional.unfold(inputs, 3, stride=2).transpose(1, 2).flatten(0, 1).numpy()
    assert np.allclose(moments["mix.weight"].mean, rows.mean(0), atol=1e-5)
    assert np.allclose(moments["mix.weight"].covariance, np.cov(rows.T, bias=True), atol=1e-4)


def test_cap_order_is_greedy_forward_selection_by_definition():
    torch.manual_seed(1)
    x = torch.randn(32, 3, 8, 8)
    _model, plan, tensors, moments, orders, *_ = prepare("concat", x)
    group = next(i for i, g in enumerate(plan.groups) if g.name == "left")
    covariance = moments["mix.weight"].covariance
    covariance = covariance[:54, :54] + np.eye(54) * RIDGE * covariance.diagonal()[:54].mean()
    weight = tensors["mix.weight"].flatten(1).double().numpy()[:, :54]

    def explained(channels):
        rows = np.array([c * 9 + k for c in channels for k in range(9)])
        cross = covariance[rows] @ weight.T
        return np.sum(cross * np.linalg.solve(covariance[np.ix_(rows, rows)], cross))

    chosen = []
    while len(chosen) < 6:
        rest = [c for c in range(6) if c not in chosen]
        chosen.append(max(rest, key=lambda c: explained([*chosen, c])))
    assert orders[group].tolist() == chosen


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("name", NAMES)
def test_every_order_is_a_permutation(name, criterion):
    _, plan, _, _, orders, *_ = prepare(name, criterion=criterion)
    for group, order in zip(plan.groups, orders, strict=True):
        assert sorted(order.tolist()) == list(range(group.num_channels))


def test_l1_keeps_the_channel_with_the_larger_filter():
    model, _ = make("concat")
    with torch.no_grad():
        model.left.weight[4] *= 100
    plan = make_plan(model, torch.zeros(1, 3, 8, 8))
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    assert rank_channels("l1", plan, tensors, Statistics(), 0)[0][0] == 4


def test_bn_recalibration_gives_batch_statistics_and_restores_momentum():
    model, _ = make("resnet")
    x = torch.randn(64, 3, 16, 16)
    net = Skeleton(model).model
    recalibrate_bn(net, x, batch_size=64)
    first = net.conv1(x)
    assert torch.allclose(net.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(net.bn1.running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert net.bn1.momentum == 0.1
    assert not net.bn1.training
