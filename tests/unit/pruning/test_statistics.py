"""Statistics against their definitions."""

import dataclasses
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cacp_ray.errors import EvaluationError
from cacp_ray.pruning import statistics as module_of_statistics
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.patches import choose_places, take_inputs, take_outputs
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from tests.unit.pruning.networks import NAMES, Twice, make

EVERY_PLACE = 10_000


class Tokens(nn.Module):
    """Linear layers on (N, H, W, C)."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 2, stride=2)
        self.up = nn.Linear(6, 12)
        self.down = nn.Linear(12, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).permute(0, 2, 3, 1)
        x = x + self.down(functional.gelu(self.up(x)))
        return self.head(x.mean((1, 2)))


def build(name):
    if name in NAMES:
        return make(name)
    torch.manual_seed(0)
    return {"twice": Twice, "tokens": Tokens}[name]().eval(), torch.randn(2, 3, 8, 8)


def collect(model, x, labels=None, **options):
    plan = make_plan(model, x[:1])
    options = {"seed": 0, "positions": EVERY_PLACE} | options
    batches = image_batches(x, labels, options.pop("batch_size", 125))
    return plan, collect_statistics(model, plan, batches, **options)


@pytest.mark.parametrize("batch_size", [3, 8])
def test_moments_are_mean_and_covariance_of_the_unfolded_input(batch_size):
    torch.manual_seed(1)
    model, _ = make("concat")
    x = torch.randn(8, 3, 8, 8)
    _, found = collect(model, x, batch_size=batch_size)
    with torch.no_grad():
        inputs = model.norm(torch.cat([model.left(x), model.right(x)], 1)).relu()
    rows = functional.unfold(inputs, 3, stride=2).transpose(1, 2).flatten(0, 1).numpy()
    moments = found.inputs["mix.weight"]
    assert np.allclose(moments.mean, rows.mean(0), atol=1e-5)
    assert np.allclose(moments.covariance, np.cov(rows.T, bias=True), atol=1e-5)
    assert np.array_equal(moments.covariance, moments.covariance.T)


def test_a_layer_called_twice_pools_its_rows():
    torch.manual_seed(1)
    model, _ = build("twice")
    x = torch.randn(8, 3, 8, 8)
    _, found = collect(model, x)
    with torch.no_grad():
        first = model.stem(x).relu()
        second = first + model.shared(first).relu()
    rows = [
        functional.unfold(y, 3, padding=1).transpose(1, 2).flatten(0, 1) for y in (first, second)
    ]
    rows = torch.cat(rows).numpy()
    assert np.allclose(
        found.inputs["shared.weight"].covariance, np.cov(rows.T, bias=True), atol=1e-5
    )


def test_linear_layers_on_feature_maps_are_sampled_at_places():
    torch.manual_seed(1)
    model, _ = build("tokens")
    x = torch.randn(8, 3, 8, 8)
    _, found = collect(model, x)
    with torch.no_grad():
        rows = model.stem(x).permute(0, 2, 3, 1).reshape(-1, 6).numpy()
    assert np.allclose(found.inputs["up.weight"].covariance, np.cov(rows.T, bias=True), atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False), (3, 4, 9, 8)),
        (
            nn.Conv2d(4, 5, (1, 3), dilation=(1, 2), padding_mode="reflect", padding=(0, 2)),
            (3, 4, 7, 7),
        ),
        (nn.Conv2d(4, 5, 3, padding="same"), (3, 4, 6, 6)),
        (nn.Linear(4, 5), (3, 4)),
        (nn.Linear(4, 5), (3, 6, 2, 4)),
    ],
)
@pytest.mark.parametrize("positions", [2, EVERY_PLACE])
def test_weight_times_input_rows_is_output_rows(layer, shape, positions):
    torch.manual_seed(1)
    x = torch.randn(shape)
    if x.ndim == 4 and isinstance(layer, nn.Conv2d):
        x = x.contiguous(memory_format=torch.channels_last)
    with torch.no_grad():
        y = layer(x)
        places = choose_places(layer, x, positions, torch.Generator().manual_seed(0))
        bias = 0 if layer.bias is None else layer.bias
        ours = take_inputs(layer, x, places) @ layer.weight.flatten(1).T + bias
        assert torch.allclose(ours, take_outputs(layer, y, places), atol=1e-5)
    assert len(ours) == min(positions, y.numel() // (3 * 5)) * 3


def test_separable_form_has_the_partial_traces_of_the_covariance(monkeypatch):
    torch.manual_seed(1)
    model, _ = make("plain")
    x = torch.randn(300, 3, 8, 8)
    _, dense = collect(model, x)
    monkeypatch.setattr(module_of_statistics, "SEPARABLE_ABOVE", 0)
    _, separable = collect(model, x)
    assert {found.taps is None for found in separable.inputs.values()} == {True, False}
    for name, found in separable.inputs.items():
        whole = dense.inputs[name]
        taps = 1 if found.taps is None else len(found.taps)
        between = np.ones((1, 1)) if found.taps is None else found.taps
        cube = whole.covariance.reshape(-1, taps, len(whole.mean) // taps, taps)
        assert np.allclose(found.mean, whole.mean, atol=1e-5)
        expected = np.einsum("ctdt->cd", cube) / taps
        assert np.allclose(found.covariance, expected, atol=1e-3 * expected.max())
        expected = np.einsum("ctcu->tu", cube)
        assert np.allclose(between * np.trace(found.covariance), expected, rtol=1e-3)


def test_large_layers_are_separable_and_small_ones_dense():
    class Wide(nn.Sequential):
        def __init__(self):
            conv = nn.Conv2d(3, 460, 3, padding=1)
            super().__init__(
                conv, nn.ReLU(), nn.Conv2d(460, 8, 3), nn.ReLU(), nn.Conv2d(8, 130, 1),
                nn.Flatten(), nn.Linear(130 * 36, 5),
            )  # fmt: skip

    x = torch.randn(4, 3, 8, 8)
    _, found = collect(Wide().eval(), x)
    shapes = {name: found.inputs[name].covariance.shape for name in found.inputs}
    assert shapes == {"2.weight": (460, 460), "4.weight": (8, 8), "6.weight": (130, 130)}
    assert found.inputs["2.weight"].taps.shape == (9, 9)
    assert found.inputs["6.weight"].taps.shape == (36, 36)
    assert np.trace(found.inputs["6.weight"].taps) == pytest.approx(36)


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "twice", "tokens"])
def test_gate_gradients_are_derivatives_of_the_loss(name, is_frozen):
    """Central differences of each image's loss, by scaling a channel at all its readers."""
    torch.manual_seed(1)
    model, x = build(name)
    model = model.double().requires_grad_(not is_frozen)
    x = torch.randn(3, *x.shape[1:]).double().contiguous(memory_format=torch.channels_last)
    labels = torch.tensor([0, 3, 1])
    plan = make_plan(model.float(), x[:1].float())
    model.double()
    found = collect_statistics(model, plan, image_batches(x, labels, 2), seed=0, kinds={"gates"})
    assert not found.inputs
    assert all(p.grad is None for p in model.parameters())
    modules = dict(model.named_modules())

    def losses(group, channel, scale):
        hooks = []
        for consumer in plan.consumers:
            axis = plan.axes[consumer.weight, 1]
            factor = np.where((axis.group == group) & (axis.channel == channel), scale, 1.0)
            factor = torch.from_numpy(factor)

            def apply(module, args, factor=factor):
                is_linear = isinstance(module, nn.Linear)
                return (args[0] * (factor if is_linear else factor[:, None, None]),)

            hooks.append(modules[consumer.module].register_forward_pre_hook(apply))
        with torch.no_grad():
            loss = functional.cross_entropy(model(x), labels, reduction="none")
        for hook in hooks:
            hook.remove()
        return loss

    step = 1e-5
    for g, (group, gate) in enumerate(zip(plan.groups, found.gates, strict=True)):
        assert gate.absolute.shape == gate.square.shape == (group.num_channels,)
        for channel in {0, group.num_channels - 1}:
            slope = (losses(g, channel, 1 + step) - losses(g, channel, 1 - step)) / (2 * step)
            assert gate.absolute[channel] == pytest.approx(
                slope.abs().mean().item(), rel=1e-3, abs=1e-7
            )
            assert gate.square[channel] == pytest.approx(
                slope.square().mean().item(), rel=1e-3, abs=1e-9
            )


def test_both_kinds_come_from_one_pass_and_equal_those_collected_alone():
    torch.manual_seed(1)
    model, _ = make("resnet")
    x, labels = torch.randn(10, 3, 16, 16), torch.arange(10) % 5
    plan = make_plan(model, x[:1])
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    kinds = {"inputs", "gates"}
    batches = image_batches(x, labels, 5)
    both = collect_statistics(model, plan, batches, seed=0, kinds=kinds, positions=4)
    hook.remove()
    assert len(calls) == 2  # batches
    _, inputs = collect(model, x, positions=4, batch_size=5)
    _, gates = collect(model, x, labels, kinds={"gates"}, batch_size=5)
    for name, moments in inputs.inputs.items():
        assert np.array_equal(both.inputs[name].covariance, moments.covariance)
    for ours, alone in zip(both.gates, gates.gates, strict=True):
        assert np.allclose(ours.square, alone.square, rtol=1e-4)
    assert len(both.gates) == len(plan.groups)


def test_a_group_that_nothing_reads_has_zero_gradients():
    model, x = make("plain")
    plan = dataclasses.replace(make_plan(model, x[:1]), consumers=())
    found = collect_statistics(
        model, plan, image_batches(x, torch.tensor([0, 1])), seed=0, kinds={"inputs", "gates"}
    )
    assert not found.inputs
    assert all(not gate.square.any() and not gate.absolute.any() for gate in found.gates)


class PadsInside(nn.Conv2d):
    """A convolution that pads in its forward, as TensorFlow does, without an attribute for it."""

    def forward(self, input):
        return functional.conv2d(
            functional.pad(input, (1, 1, 1, 1)), self.weight, self.bias, self.stride
        )


class SameProduct(nn.Conv2d):
    """A layer with its own forward, which computes the plain product."""

    def forward(self, input):
        return functional.conv2d(input, self.weight, self.bias)


@pytest.mark.parametrize("side", [1, 2, 6])
@pytest.mark.parametrize(
    ("layer", "size", "is_measured"),
    [(PadsInside, 3, False), (SameProduct, 1, True)],
)
def test_layers_that_do_not_give_weight_times_input_rows_are_left_out(
    layer, size, is_measured, side
):
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.AdaptiveAvgPool2d(side), layer(6, 7, size), nn.ReLU(),
        nn.Conv2d(7, 4, 1), nn.Flatten(), nn.Linear(4 * side**2, 5),
    ).eval()  # fmt: skip
    plan, found = collect(model, torch.randn(4, 3, 8, 8))
    assert "2.weight" in {consumer.weight for consumer in plan.consumers}
    assert ("2.weight" in found.inputs) == is_measured
    assert {"4.weight", "6.weight"} <= set(found.inputs)


def test_a_layer_that_sees_no_rows_has_no_moments():
    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 6, 3)
            self.mix, self.head = nn.Conv2d(6, 6, 1), nn.Linear(6, 5)

        def forward(self, x):
            x = self.stem(x)
            if len(x) > 2:
                self.mix(x[:0])
            else:
                x = self.mix(x)
            return self.head(x.mean((2, 3)))

    _, found = collect(Skips().eval(), torch.randn(4, 3, 8, 8))
    assert set(found.inputs) == {"head.weight"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", ["inputs", "gates"])
def test_activations_that_are_not_finite_are_refused_in_one_line(value, kind):
    model, x = make("plain")
    plan = make_plan(model, x[:1])
    with torch.no_grad():
        model[0].bias.fill_(value)
        model[-1].weight *= 1e30
    with pytest.raises(EvaluationError, match=r"NaN.*calibration images.*check") as caught:
        collect_statistics(
            model, plan, image_batches(x, torch.tensor([0, 1])), seed=0, kinds={kind}
        )
    assert "\n" not in str(caught.value)
    assert re.match(r"3\b" if kind == "inputs" else r"\w", str(caught.value))


def test_statistics_without_kinds_run_nothing():
    model, x = make("plain")
    plan = make_plan(model, x[:1])
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    assert collect_statistics(model, plan, image_batches(x), seed=0, kinds=()) == Statistics()
