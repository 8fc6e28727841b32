"""A built network is an ordinary one: every parameter learns, and it saves and loads."""

import functools

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from torchvision import models

from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import ResizableNetwork, build_subnet
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from tests.small import mostly_slow

CLASSES = 4
BATCH = 6
NETWORKS = {
    "densenet121": (32, {}),
    "mobilenet_v2": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (32, {"aux_logits": False, "init_weights": False}),
}


def make(name):
    side, options = NETWORKS[name]
    torch.manual_seed(0)
    model = models.get_model(name, weights=None, num_classes=CLASSES, **options).eval()
    return model, torch.randn(BATCH, 3, side, side)


@functools.cache
def cut(name):
    """A network at random orders and keep counts, with its images."""
    model, x = make(name)
    plan = make_plan(model, x[:1])
    rng = np.random.default_rng(1)
    whole = plan.cost_model.num_channels
    counts = [int(rng.integers(max(1, n // 4), n + 1)) for n in whole]
    orders = [rng.permutation(n) for n in whole]
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    ordered = reorder_weights(plan, tensors, orders)
    return build_subnet(model, ordered | Cutter(plan)(ordered, counts)), x


def backward(model, x):
    """Loss on the batch; the gradients stay in the parameters."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(0)  # the same dropout and stochastic depth in every step
    loss = functional.cross_entropy(model(x), torch.arange(BATCH) % CLASSES)
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, ["mobilenet_v2"]))
def test_every_parameter_learns_and_the_loss_falls(name):
    small, x = cut(name)
    small.train()
    optimizer = torch.optim.SGD(small.parameters(), lr=0.005)  # more diverges on EfficientNet
    losses = [backward(small, x)]
    # Stochastic depth skips a block for single images; this draw skips no block for all images.
    silent = [n for n, p in small.named_parameters() if p.grad is None or not p.grad.any()]
    assert silent == []
    for _ in range(4):
        optimizer.step()
        losses.append(backward(small, x))
    assert min(losses) < 0.9 * losses[0]  # steps of this size oscillate on MobileNetV2


@pytest.mark.parametrize("name", mostly_slow(NETWORKS, ["mobilenet_v2"]))
def test_trained_weights_load_into_a_fresh_network(name, tmp_path):
    small, x = cut(name)
    small.eval()
    file = tmp_path / "model.safetensors"
    save_file(small.state_dict(), file)
    tensors = load_file(file)
    own = dict(small.state_dict())
    assert {key: value.shape for key, value in tensors.items()} == {
        key: value.shape for key, value in own.items()
    }
    resized = {key: torch.empty_like(value) for key, value in tensors.items()}
    fresh = ResizableNetwork(make(name)[0]).load(resized)
    fresh.load_state_dict(tensors, strict=True)
    with torch.no_grad():
        assert torch.equal(fresh(x), small(x))
