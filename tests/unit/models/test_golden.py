"""The weights that experiments use reach their accuracy."""

import dataclasses

import numpy as np
import pytest
import torch

from cacp_ray.data.images import read_parquet
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from cacp_ray.training.metrics import fast_dtype, measure

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.mark.parametrize(
    ("name", "weights", "whole_split"),
    [
        ("resnet20", "embedded:resnet20_cifar10", 0.8996),
        pytest.param(
            "resnet56", "tests/golden/resnet56_cifar10.safetensors", 0.9096, marks=pytest.mark.slow
        ),
    ],
)
def test_accuracy_on_the_test_sample_is_that_of_the_whole_test_split(name, weights, whole_split):
    model = build_model(name, 10)
    load_weights(model, weights)
    accuracy = measure(model, *read_parquet("embedded:test").tensors(), dtype=fast_dtype())
    assert accuracy.top1 == pytest.approx(whole_split, abs=3 * accuracy.standard_error)


def public_network():
    """A network that others trained, with shortcuts without parameters, and images for it."""
    model = build_model("resnet20_padding", 10).eval()
    load_weights(model, "tests/golden/resnet20_padding_cifar10.safetensors")
    split = dataclasses.replace(read_parquet("embedded:test"), mean=IMAGENET_MEAN, std=IMAGENET_STD)
    return model, split


def test_a_public_network_reaches_the_accuracy_that_its_source_states():
    model, split = public_network()
    accuracy = measure(model, *split.tensors())
    assert accuracy.top1 == pytest.approx(0.9173, abs=3 * accuracy.standard_error)


def test_a_cut_public_network_equals_one_whose_layers_make_zeros():
    model, split = public_network()
    plan = make_plan(model, split.tensors()[0][:1])
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    whole = plan.cost_model.num_channels
    counts, rng = np.maximum(whole // 2, 1).tolist(), np.random.default_rng(0)
    orders = [rng.permutation(n) for n in whole]
    masked = {key: value.clone() for key, value in tensors.items()}
    for (key, dim), axis in plan.axes.items():
        if dim == 0 and not key.endswith("running_var"):
            for g, (order, count) in enumerate(zip(orders, counts, strict=True)):
                dropped = np.isin(axis.channel, order[count:]) & (axis.group == g)
                masked[key][torch.from_numpy(dropped)] = 0
    ordered = reorder_weights(plan, tensors, orders)
    small = build_subnet(model, ordered | Cutter(plan)(ordered, counts)).eval()
    x = split.tensors()[0][:64]
    with torch.no_grad():
        assert torch.allclose(
            small(x), torch.func.functional_call(model, masked, x), atol=1e-4, rtol=1e-4
        )
