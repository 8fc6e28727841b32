"""Statistics against their definitions, and what is saved of them."""

import dataclasses
import logging
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import EvaluationError
from cacp_ray.pruning import statistics as module_of_statistics
from cacp_ray.pruning.patches import choose_places, take_inputs, take_outputs
from cacp_ray.pruning.plan import make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.statistics_file import load_statistics, save_statistics, statistics_key
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
    return plan, collect_statistics(model, plan, x, labels, **options)


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
    found = collect_statistics(model, plan, x, labels, seed=0, kinds={"gates"}, batch_size=2)
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
    both = collect_statistics(
        model, plan, x, labels, seed=0, kinds=kinds, positions=4, batch_size=5
    )
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
        model, plan, x, torch.tensor([0, 1]), seed=0, kinds={"inputs", "gates"}
    )
    assert not found.inputs
    assert all(not gate.square.any() and not gate.absolute.any() for gate in found.gates)


class PadsInside(nn.Conv2d):
    """Pads before the product, as TensorFlow does, and says so nowhere."""

    def forward(self, input):
        return functional.conv2d(
            functional.pad(input, (1, 1, 1, 1)), self.weight, self.bias, self.stride
        )


class SameProduct(nn.Conv2d):
    """A forward of its own that gives the plain product."""

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
            if len(x) > 1:
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
        collect_statistics(model, plan, x, torch.tensor([0, 1]), seed=0, kinds={kind})
    assert "\n" not in str(caught.value)
    assert re.match(r"3\b" if kind == "inputs" else r"\w", str(caught.value))


def image_set(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, 5, 6), tuple("abcde"))


def saved(path, monkeypatch):
    torch.manual_seed(1)
    model, _ = make("plain")
    x = torch.randn(6, 3, 8, 8)
    monkeypatch.setattr(module_of_statistics, "SEPARABLE_ABOVE", 100)
    plan, statistics = collect(model, x, torch.arange(6) % 5, kinds={"inputs", "gates"})
    save_statistics(path, statistics, "key")
    assert {m.taps is None for m in statistics.inputs.values()} == {True, False}
    return plan, statistics


def test_what_is_read_is_what_was_saved_bit_for_bit(tmp_path, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    _, statistics = saved(path, monkeypatch)
    found = load_statistics(path, "key")
    assert list(found.inputs) == list(statistics.inputs)
    for name, moments in statistics.inputs.items():
        for field, value in vars(moments).items():
            assert np.array_equal(getattr(found.inputs[name], field), value)
    for ours, gate in zip(found.gates, statistics.gates, strict=True):
        assert np.array_equal(ours.square, gate.square)
        assert np.array_equal(ours.absolute, gate.absolute)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_or_one_of_something_else_is_not_used(tmp_path, monkeypatch, caplog):
    path = tmp_path / "statistics.safetensors"
    assert load_statistics(path, "key") is None
    saved(path, monkeypatch)
    assert load_statistics(path, "other") is None
    assert not caplog.records


@pytest.mark.parametrize("keep", [0, 7, 300, -10])
def test_a_damaged_file_is_not_used_and_logged_in_one_line(tmp_path, monkeypatch, caplog, keep):
    path = tmp_path / "statistics.safetensors"
    saved(path, monkeypatch)
    path.write_bytes(path.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        assert load_statistics(path, "key") is None
    (record,) = caplog.records
    assert "statistics.safetensors" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_key_tells_everything_apart_that_changes_the_statistics():
    model, x = make("plain")
    plan = make_plan(model, x[:1])
    other_model, other_x = make("concat")
    images = image_set()
    changed = images.images.copy()
    changed[5, 7, 7, 2] ^= 1
    relabelled = images.labels.copy()
    relabelled[5] += 1
    options = {"seed": 0, "kinds": {"inputs"}}

    def key(sha256="a", plan=plan, images=images, **change):
        return statistics_key(sha256, plan, images, **(options | change))

    keys = [
        key(),
        key(sha256="b"),
        key(plan=make_plan(other_model, other_x[:1])),
        key(images=dataclasses.replace(images, images=changed)),
        key(images=dataclasses.replace(images, labels=relabelled)),
        key(images=dataclasses.replace(images, std=(1.0, 1.0, 1.0))),
        key(images=images.take(5)),
        key(seed=1),
        key(kinds={"inputs", "gates"}),
        key(positions=16),
    ]
    assert len(set(keys)) == len(keys)
    assert key(images=image_set()) == key()


def test_statistics_without_kinds_run_nothing():
    model, x = make("plain")
    plan = make_plan(model, x[:1])
    model.register_forward_pre_hook(lambda *_: pytest.fail("the network ran"))
    assert collect_statistics(model, plan, x, seed=0, kinds=()) == Statistics()
