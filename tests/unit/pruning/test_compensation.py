"""Compensation and BN re-estimation against their definitions."""

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.pruning import statistics as module_of_statistics
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.compensation import Compensator, make_factors
from cacp_ray.pruning.criteria import rank_channels
from cacp_ray.pruning.patches import take_inputs
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.recovery import recalibrate_bn
from cacp_ray.pruning.resizable import ResizableNetwork, build_subnet
from cacp_ray.pruning.statistics import collect_statistics, regularized
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from tests.unit.pruning.networks import NAMES, make


def prepare(name, images=None, criterion="cap"):
    model, x = make(name)
    x = x if images is None else images
    plan = make_plan(model, x[:1])
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    statistics = collect_statistics(model, plan, image_batches(x), seed=0, positions=10_000)
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
        rows = take_inputs(model.mix, inputs, torch.arange(9))
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


def solve_in_float64(plan, tensors, statistics, orders, consumer, counts):
    """Weight (N, D of kept inputs) and intercept from the dense formulas; order of the subnet."""
    moments = statistics[consumer.weight]
    covariance = torch.from_numpy(moments.covariance)
    size = tensors[consumer.weight][0, 0].numel()
    axis = plan.axes[consumer.weight, 1]
    inputs = axis.reordered(orders)[axis.positions(counts)]
    kept = torch.from_numpy((inputs[:, None] * size + np.arange(size)).ravel())
    ridged = regularized(covariance)
    if moments.taps is not None:
        taps = torch.from_numpy(moments.taps)
        ridged = torch.kron(ridged, taps + 1e-9 * torch.eye(len(taps)))
    weight = tensors[consumer.weight].flatten(1).double()
    solved = torch.linalg.solve(ridged[kept][:, kept], ridged[kept] @ weight.T)  # (|S|, N)
    if consumer.batch_norm is not None:
        wanted = (weight * (weight @ ridged)).sum(1)
        explained = (solved * (ridged[kept][:, kept] @ solved)).sum(0)
        solved = solved * (wanted / explained).sqrt()
    mean = torch.from_numpy(moments.mean)
    shift = weight @ mean - mean[kept] @ solved
    axis = plan.axes.get((consumer.weight, 0))
    if axis is None:
        return solved.T, shift
    outputs = torch.from_numpy(axis.reordered(orders)[axis.positions(counts)])
    return solved.T[outputs], shift[outputs]


@pytest.mark.parametrize("separable_above", [60, 10_000])
@pytest.mark.parametrize("share", [0.3, 0.8])
@pytest.mark.parametrize("name", NAMES)
def test_float32_products_equal_the_dense_formulas_in_float64(
    name, share, separable_above, monkeypatch
):
    monkeypatch.setattr(module_of_statistics, "SEPARABLE_ABOVE", separable_above)
    torch.manual_seed(1)
    x = torch.randn(64, *make(name)[1].shape[1:])
    _, plan, tensors, moments, orders, ordered, factors = prepare(name, x)
    counts = [max(1, int(share * n)) for n in plan.cost_model.num_channels]
    small = Compensator(plan, ordered, factors)(counts)
    for consumer in plan.consumers:
        weight, shift = solve_in_float64(plan, tensors, moments, orders, consumer, counts)
        ours = small[consumer.weight].flatten(1).double()
        assert (ours - weight).norm() < 1e-4 * weight.norm()
        # The intercept was added to the cut bias, or subtracted from the cut running mean.
        bias, sign = f"{consumer.module}.bias", 1
        if bias not in ordered:
            bias, sign = f"{consumer.batch_norm}.running_mean", -1
        if bias in ordered:
            axis = plan.axes.get((bias, 0))
            kept = slice(None) if axis is None else torch.from_numpy(axis.positions(counts))
            added = sign * (small.get(bias, ordered[bias]) - ordered[bias][kept])
            scale = shift.abs().max() + ordered[bias].abs().max()
            assert (added - shift).abs().max() < 1e-4 * scale


def test_every_reader_of_a_cut_residual_stream_is_compensated():
    """Cutting the stream alone changes each of its readers, and compensation repairs them."""
    torch.manual_seed(1)
    x = torch.randn(200, 3, 16, 16)
    model, plan, _, _, _, ordered, factors = prepare("resnet", x)
    counts = plan.cost_model.num_channels.tolist()
    stream = next(g for g, group in enumerate(plan.groups) if group.is_residual)
    counts[stream] -= 4
    readers = {
        consumer.weight
        for consumer in plan.consumers
        if (plan.axes[consumer.weight, 1].group == stream).any()
    }
    assert len(readers) >= 2
    cut = Cutter(plan)(ordered, counts)
    repaired = Compensator(plan, ordered, factors)(counts)
    for consumer in plan.consumers:
        same = torch.allclose(repaired[consumer.weight], cut[consumer.weight], atol=1e-4)
        assert same == (consumer.weight not in readers), consumer.weight
    with torch.no_grad():
        whole = model(x)
        errors = [
            (build_subnet(model, ordered | small)(x) - whole).square().mean()
            for small in (cut, repaired)
        ]
    assert errors[1] < 0.7 * errors[0]


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


def test_bn_recalibration_gives_batch_statistics_and_restores_momentum():
    model, _ = make("resnet")
    x = torch.randn(64, 3, 16, 16)
    net = ResizableNetwork(model).model
    recalibrate_bn(net, x.split(64))
    first = net.conv1(x)
    assert torch.allclose(net.bn1.running_mean, first.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(net.bn1.running_var, first.var((0, 2, 3)), rtol=1e-3)
    assert net.bn1.momentum == 0.1
    assert not net.bn1.training


@pytest.mark.parametrize("num_images", [17, 33, 40])
def test_bn_recalibration_weighs_every_image_alike(num_images):
    """The images may leave the last batch short, and maps may have one pixel."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(num_images, 3, 8, 8)
    recalibrate_bn(net, x.tensor_split(-(-len(x) // 16)))
    with torch.no_grad():
        expected = net[:2](x).mean((0, 2, 3))
    assert torch.allclose(net[2].running_mean, expected, atol=1e-6)


def test_bn_without_running_statistics_is_passed_by():
    torch.manual_seed(1)
    first, second = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
    net = nn.Sequential(first, second).eval()
    x = torch.randn(8, 3, 4, 4)
    recalibrate_bn(net, [x])
    assert torch.allclose(second.running_var, first(x).var((0, 2, 3)), rtol=1e-3)
    assert first.running_mean is None
