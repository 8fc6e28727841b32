"""Sequential recovery fits each layer by least squares to its inputs in the cut network."""

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.pruning import sequential
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.compensation import Compensator, make_factors
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.sequential import recover_sequentially
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.pruning.surgery import reorder_weights
from tests.unit.pruning.networks import NAMES, Twice, make


class Folded(nn.Module):
    """Linear layers on rows of all places of all images, or on places before images."""

    def __init__(self, is_image_first=True):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.mix = nn.Linear(8, 9)
        self.head = nn.Linear(9, 5)
        self.is_image_first = is_image_first

    def forward(self, x):
        x = self.stem(x).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(2)  # (N, 8, 4)
        if self.is_image_first:
            rows = x.permute(0, 2, 1).flatten(0, 1)
            x = self.mix(rows).relu().unflatten(0, (-1, 4)).mean(1)
        else:
            x = self.mix(x.permute(2, 0, 1)).relu().mean(0)
        return self.head(x)


MODELS = {"shared": Twice, "folded": Folded, "places": lambda: Folded(is_image_first=False)}


class Case:
    """A network cut to a share of its channels and compensated, and images."""

    def __init__(self, name, share, num_images=200):
        torch.manual_seed(2)
        self.model, x = (
            (MODELS[name]().eval(), torch.zeros(1, 3, 8, 8)) if name in MODELS else make(name)
        )
        self.x = torch.randn(num_images, *x.shape[1:])
        self.plan = make_plan(self.model, x[:1])
        rng = np.random.default_rng(0)
        self.orders = [rng.permutation(group.num_channels) for group in self.plan.groups]
        self.counts = [max(1, int(share * n)) for n in self.plan.cost_model.num_channels]
        tensors = {key: value.detach() for key, value in self.model.state_dict().items()}
        self.ordered = reorder_weights(self.plan, tensors, self.orders)
        moments = collect_statistics(
            self.model, self.plan, image_batches(self.x), seed=0, positions=99
        ).inputs
        factors = make_factors(self.plan, self.ordered, moments, self.orders)
        self.compensated = Compensator(self.plan, self.ordered, factors)(self.counts)

    def recover(self, **options):
        options = {"seed": 0, "positions": 10_000, "batch_size": 64} | options
        return recover_sequentially(
            self.model, self.plan, self.compensated, self.orders, self.counts, self.x, **options
        )

    def build(self, tensors):
        return build_subnet(self.model, self.ordered | tensors)

    def error(self, tensors):
        with torch.no_grad():
            return (self.build(tensors)(self.x) - self.model(self.x)).square().mean().item()


def inputs_and_outputs(model, layer, x):
    """Inputs and outputs of a layer."""
    seen = []
    module = dict(model.named_modules())[layer]
    hook = module.register_forward_hook(lambda _, args, y: seen.append((args[0], y)))
    with torch.no_grad():
        model(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_cut_changes_nothing(name):
    case = Case(name, 1.0)
    with torch.no_grad():
        ours = case.build(case.recover())(case.x)
        assert torch.allclose(ours, case.model(case.x), atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("name", "layer"), [("plain", "12"), ("resnet", "fc"), ("depthwise", "head")]
)
def test_the_last_layer_is_least_squares_on_the_cut_networks_own_inputs(name, layer):
    case = Case(name, 0.6)
    small = case.build(case.recover())
    inputs, ours = inputs_and_outputs(small, layer, case.x)
    _, wanted = inputs_and_outputs(case.model, layer, case.x)
    design = np.column_stack([inputs.numpy(), np.ones(len(inputs))]).astype(np.float64)
    solution = np.linalg.lstsq(design, wanted.numpy().astype(np.float64), rcond=None)[0]
    fitted = design @ solution
    assert np.abs(ours.numpy() - fitted).max() < 5e-3 * np.abs(fitted).max()


def test_outputs_before_bn_have_the_mean_and_variance_of_the_original():
    """The law holds deep in the network too, where compensation alone has drifted."""
    case = Case("resnet", 0.6)
    small = case.build(case.recover())
    last = [name for name, m in case.model.named_modules() if isinstance(m, nn.Conv2d)][-1]
    norm = next(c.batch_norm for c in case.plan.consumers if c.module == last)
    _, ours = inputs_and_outputs(small, last, case.x)
    _, whole = inputs_and_outputs(case.model, last, case.x)
    axis = case.plan.axes[f"{last}.weight", 0]
    kept = torch.from_numpy(axis.reordered(case.orders)[axis.positions(case.counts)])
    shift = dict(small.named_modules())[norm].running_mean
    original = dict(case.model.named_modules())[norm].running_mean
    ours = ours - shift[:, None, None]
    whole = (whole - original[:, None, None])[:, kept]
    dims = (0, 2, 3)
    assert torch.allclose(ours.mean(dims), whole.mean(dims), atol=1e-3)
    assert torch.allclose(ours.var(dims), whole.var(dims), rtol=1e-2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("share", [0.4, 0.7])
def test_the_output_comes_closer_to_the_original(name, share):
    case = Case(name, share)
    assert case.error(case.recover()) < case.error(case.compensated)


def test_a_layer_called_twice_keeps_its_compensated_weight():
    case = Case("shared", 0.5)
    found = case.recover()
    assert torch.equal(found["shared.weight"], case.compensated["shared.weight"])
    assert not torch.equal(found["head.weight"], case.compensated["head.weight"])


def test_rows_of_an_image_that_are_batch_entries_stay_with_their_targets():
    case = Case("folded", 0.6)
    small = case.build(case.recover())
    inputs, ours = inputs_and_outputs(small, "mix", case.x)
    _, wanted = inputs_and_outputs(case.model, "mix", case.x)
    axis = case.plan.axes["mix.weight", 0]
    wanted = wanted[:, axis.reordered(case.orders)[axis.positions(case.counts)]]
    design = np.column_stack([inputs.numpy(), np.ones(len(inputs))]).astype(np.float64)
    solution = np.linalg.lstsq(design, wanted.numpy().astype(np.float64), rcond=None)[0]
    fitted = design @ solution
    assert np.abs(ours.numpy() - fitted).max() < 5e-3 * np.abs(fitted).max()


@pytest.mark.parametrize("num_images", [200, 4])
def test_a_layer_whose_batch_entries_are_no_images_keeps_its_compensated_weight(num_images):
    case = Case("places", 0.6, num_images=num_images)
    found = case.recover(batch_size=num_images // 2)
    assert torch.equal(found["mix.weight"], case.compensated["mix.weight"])


def test_a_layer_with_too_few_rows_keeps_its_compensated_weight():
    case = Case("plain", 0.7, num_images=20)
    found = case.recover()
    assert torch.equal(found["12.weight"], case.compensated["12.weight"])  # 20 rows, 11 inputs
    assert not torch.equal(found["3.weight"], case.compensated["3.weight"])


def test_bounds_on_memory_take_fewer_places_and_images(monkeypatch):
    case = Case("plain", 0.7)
    whole = case.recover()
    taken = []
    take = sequential.take_outputs

    def count(module, y, places):
        taken.append(len(places))
        return take(module, y, places)

    monkeypatch.setattr(sequential, "take_outputs", count)
    monkeypatch.setattr(sequential, "BATCH_PIXELS", 128 * 64)
    monkeypatch.setattr(sequential, "TARGET_BYTES", 128 * 10 * 4 * (8 + 11 + 5))
    found = case.recover()
    assert len(taken) == 2 * 3  # batches of 64 images, three layers
    assert max(taken) == 10
    assert not torch.equal(found["3.weight"], whole["3.weight"])


def test_the_base_network_and_the_given_tensors_stay_as_they_were():
    case = Case("resnet", 0.5)
    base = {name: value.clone() for name, value in case.model.state_dict().items()}
    given = {name: value.clone() for name, value in case.compensated.items()}
    first = case.recover()
    again = case.recover()
    assert all(torch.equal(value, base[name]) for name, value in case.model.state_dict().items())
    assert all(torch.equal(value, given[name]) for name, value in case.compensated.items())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert first.keys() == case.compensated.keys()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in case.model.modules())
