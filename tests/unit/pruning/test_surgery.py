"""Laws of cutting, for any keep counts from 1 to all channels and any importance order."""

import functools
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torchvision import models

from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.subnet import describe_kept, load_subnet, save_subnet
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from cacp_ray.pruning.verify import count_macs
from tests.unit.pruning import networks

# Networks that a factory can name, and so can be saved: name -> (factory, classes, image side).
FACTORIES = {
    "resnet20": ("resnet20", 10, 32),
    "mobile": ("tests.unit.pruning.test_surgery:make_mobile", 5, 16),
    "plain": ("tests.unit.pruning.networks:Plain", 5, 8),
    "concat": ("tests.unit.pruning.networks:Concat", 5, 8),
    "depthwise": ("tests.unit.pruning.networks:Depthwise", 5, 8),
}
NAMES = (*networks.NAMES, "resnet20", "mobile")


def make_mobile(num_classes):
    """MobileNetV2 with three stages of a quarter of its width."""
    stages = [[1, 16, 1, 1], [6, 24, 2, 2], [6, 32, 2, 2]]
    return models.MobileNetV2(
        num_classes=num_classes, width_mult=0.25, inverted_residual_setting=stages
    )


@functools.cache
def prepared(name):
    if name in networks.NAMES:
        model, x = networks.make(name)
    else:
        torch.manual_seed(0)
        factory, classes, side = FACTORIES[name]
        model, x = build_model(factory, classes).eval(), torch.randn(2, 3, side, side)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.1)
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    return model, x, make_plan(model, x[:1]), tensors


def draw(name, data):
    """Keep counts and importance orders of a network."""
    plan = prepared(name)[2]
    whole = plan.cost_model.num_channels.tolist()
    counts = data.draw(st.tuples(*(st.integers(1, n) for n in whole)), label="keep counts")
    rng = np.random.default_rng(data.draw(st.integers(0, 2**16), label="seed of the orders"))
    return counts, [rng.permutation(n) for n in whole]


def cut(name, counts, orders):
    model, _, plan, tensors = prepared(name)
    ordered = reorder_weights(plan, tensors, orders)
    return build_subnet(model, ordered | Cutter(plan)(ordered, counts)).eval()


def describe(name, counts, orders):
    factory, classes, side = FACTORIES[name]
    return {
        "model": factory,
        "num_classes": classes,
        "input_shape": [3, side, side],
        "cost": "macs",
        "rate": 0.5,
        "cost_kept": 0.5,
        "groups": describe_kept(prepared(name)[2], orders, counts),
    }


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_small_network_runs_and_costs_what_was_predicted(name, data):
    model, x, plan, _ = prepared(name)
    counts, orders = draw(name, data)
    small = cut(name, counts, orders)
    with torch.no_grad():
        assert small(x).shape == model(x).shape
    assert count_macs(small, x[:1]) == plan.macs(counts)
    assert sum(p.numel() for p in small.parameters()) == plan.params(counts)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_coupled_layers_agree_and_no_group_is_empty(name, data):
    _, _, plan, tensors = prepared(name)
    counts, orders = draw(name, data)
    small = cut(name, counts, orders)
    sizes = {key: value.shape for key, value in small.state_dict().items()}
    for (tensor, dim), axis in plan.axes.items():
        whole = np.bincount(axis.group + 1, minlength=len(counts) + 1)  # positions of each group
        share = np.append(1.0, np.array(counts) / plan.cost_model.num_channels)
        assert sizes[tensor][dim] == pytest.approx(float(whole @ share)), (tensor, dim)
        assert 0 < sizes[tensor][dim] <= tensors[tensor].shape[dim]
    for module in small.modules():
        if isinstance(module, nn.Conv2d):
            assert module.out_channels == module.weight.shape[0]
            assert module.in_channels == module.weight.shape[1] * module.groups
        elif isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape
        elif isinstance(module, nn.BatchNorm2d):
            assert module.num_features == len(module.weight) == len(module.running_mean)


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=12, deadline=None)
def test_cut_network_equals_one_whose_layers_make_zeros(name, data):
    model, x, plan, tensors = prepared(name)
    assert not plan.normalised  # zeros would count there
    counts, orders = draw(name, data)
    masked = {key: value.clone() for key, value in tensors.items()}
    # A dropped channel is zero where it is made: filters, biases, and BN scale and shift.
    for (key, dim), axis in plan.axes.items():
        module = model.get_submodule(key.rpartition(".")[0])
        is_transposed = isinstance(module, nn.ConvTranspose2d) and key.endswith(".weight")
        if dim == int(is_transposed) and not key.endswith("running_var"):
            for g, (order, count) in enumerate(zip(orders, counts, strict=True)):
                dropped = np.isin(axis.channel, order[count:]) & (axis.group == g)
                masked[key].movedim(dim, 0)[torch.from_numpy(dropped)] = 0
    with torch.no_grad():
        expected = torch.func.functional_call(model, masked, x)
        assert torch.allclose(cut(name, counts, orders)(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FACTORIES)
@given(data=st.data())
@settings(max_examples=5, deadline=None)
def test_saved_network_loads_to_the_same_weights_and_logits(name, data):
    x = prepared(name)[1]
    counts, orders = draw(name, data)
    small = cut(name, counts, orders)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        save_subnet(Path(folder), small, describe(name, counts, orders))
        loaded = load_subnet(folder)
        tensors = loaded.state_dict()
        assert tensors.keys() == small.state_dict().keys()
        assert all(torch.equal(tensors[key], value) for key, value in small.state_dict().items())
        # The last bit of a convolution may depend on where its weights are in memory.
        assert torch.allclose(loaded(x), small(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FACTORIES)
def test_indices_are_where_the_tensors_are(name):
    _, _, plan, tensors = prepared(name)
    whole = plan.cost_model.num_channels
    orders = [np.arange(n)[::-1].copy() for n in whole]
    with FakeTensorMode():  # knows sizes and devices, and refuses two devices in one operation
        on_gpu = {key: torch.empty(value.shape, device="cuda") for key, value in tensors.items()}
        ordered = reorder_weights(plan, on_gpu, orders)
        small = Cutter(plan)(ordered, np.maximum(1, whole // 2).tolist())
        assert {tensor.device.type for tensor in (ordered | small).values()} == {"cuda"}


def test_new_process_loads_them_to_the_same_logits(tmp_path):
    names = [name for name in FACTORIES if name != "mobile"]  # "mobile" imports this slow module
    rng = np.random.default_rng(0)
    for name in names:
        _, x, plan, _ = prepared(name)
        whole = plan.cost_model.num_channels
        counts = [int(rng.integers(1, n + 1)) for n in whole]
        orders = [rng.permutation(n) for n in whole]
        small = cut(name, counts, orders)
        save_subnet(tmp_path / name, small, describe(name, counts, orders))
        with torch.no_grad():
            torch.save((x, small(x)), tmp_path / f"{name}.pt")
    code = (
        "import sys, torch\n"
        "from cacp_ray.pruning.subnet import load_subnet\n"
        "torch.set_num_threads(int(sys.argv[1]))\n"  # sums depend on it
        "for folder in sys.argv[2:]:\n"
        "    x, expected = torch.load(folder + '.pt')\n"
        "    assert torch.equal(load_subnet(folder, trust=True)(x), expected), folder"
    )
    folders = [str(tmp_path / name) for name in names]
    root = Path(__file__).parents[3]
    threads = str(torch.get_num_threads())
    subprocess.run([sys.executable, "-c", code, threads, *folders], check=True, cwd=root)
