"""Fused networks compute what the original computes, or are not used."""

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional

from cacp_ray.data.images import ImageSet
from cacp_ray.evaluation.fusion import FusedConv2d, fuse
from cacp_ray.evaluation.network import FastNetwork, put_pixels
from cacp_ray.evaluation.preparation import CutNetwork, prepare
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.pruning.surgery import all_tensors

torch.manual_seed(0)


def conv(num_in, num_out, **options):
    return nn.Conv2d(num_in, num_out, 3, padding=1, **options)


class Plain(nn.Module):
    """Convolution, BN and `act`."""

    def __init__(self, act):
        super().__init__()
        self.conv1, self.bn1, self.act = conv(3, 8), nn.BatchNorm2d(8), act
        self.conv2, self.fc = conv(8, 8, bias=False), nn.Linear(8, 5)

    def forward(self, x):
        x = self.act(self.bn1(self.conv1(x)))
        return self.fc(self.conv2(x).mean((2, 3)))


class Residual(nn.Module):
    """A shortcut made after the branch, as in torchvision's ResNets."""

    def __init__(self, after):
        super().__init__()
        self.conv1, self.bn1 = conv(3, 8, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = conv(8, 8, bias=False), nn.BatchNorm2d(8)
        self.shortcut, self.fc, self.after = nn.Conv2d(8, 8, 1), nn.Linear(8, 5), after

    def forward(self, x):
        x = functional.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(x))
        out += self.shortcut(x)
        return self.fc(self.after(out).mean((2, 3)))


class Shared(Plain):
    """One convolution is called twice, and two take its output."""

    def forward(self, x):
        x = self.bn1(self.conv1(x))
        y = self.conv2(x)
        return self.fc((functional.relu(y) + self.conv2(torch.relu(y)) + x).mean((2, 3)))


class WritesInPlace(Plain):
    """The convolution's input changes after it was read."""

    def forward(self, x):
        x = self.conv1(x)
        y = self.conv2(x)
        x.relu_()
        return self.fc((y + x).mean((2, 3)))


class CountsChannels(Plain):
    """A channel count is a number of the traced graph."""

    def forward(self, x):
        x = self.conv1(x)
        width = self.conv1.out_channels
        return self.fc(self.conv2(x.view(len(x), width, -1).view_as(x) / width).mean((2, 3)))


class Branches(Plain):
    """The computation depends on values, which torch.fx cannot trace."""

    def forward(self, x):
        x = self.conv1(x)
        return self.fc(self.conv2(x if x.abs().sum() >= 0 else -x).mean((2, 3)))


def randomize(model):
    generator = torch.Generator().manual_seed(0)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
        elif name.endswith("running_var"):
            buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return model.eval()


# oneDNN refuses bfloat16 on CPUs without AVX-512.
HAS_BFLOAT16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()


def images(size=16):
    return torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(1)).contiguous(
        memory_format=torch.channels_last
    )


def count(network, kind):
    return sum(type(module) is kind for module in network.modules())


@pytest.mark.parametrize(
    "model",
    [
        Plain(nn.ReLU()),
        Plain(nn.ReLU6()),
        Plain(nn.SiLU()),
        Plain(nn.Hardswish(inplace=True)),
        Plain(nn.GELU()),
        Residual(nn.ReLU(inplace=True)),
        Residual(nn.ReLU6()),
        Residual(nn.Identity()),
        Shared(nn.ReLU()),
        torchvision.models.resnet18(num_classes=5),
        torchvision.models.mobilenet_v2(num_classes=5),
        torchvision.models.densenet121(num_classes=5),
    ],
    ids=lambda model: type(model).__name__,
)
@torch.inference_mode()
def test_logits_are_those_of_the_original(model):
    randomize(model)
    x = images(32)
    expected = model(x)
    assert expected.std() > 1e-4
    fused = fuse(model)
    network = fused.load(all_tensors(model))
    assert count(network, FusedConv2d)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    torch.testing.assert_close(model(x), expected)
    if HAS_BFLOAT16:
        fused.dtype = torch.bfloat16
        logits = fused.load(all_tensors(model))(x.bfloat16()).float()
        assert (logits - expected).abs().max() < 0.1 * expected.abs().max()


def test_what_follows_a_convolution_goes_into_it():
    model = randomize(Residual(nn.ReLU()))
    network = fuse(model).load(all_tensors(model))
    left = {str(node.target) for node in network.graph.nodes if node.op != "get_attr"}
    assert left == {"x", "conv1", "conv2", "shortcut", "mean", "fc", "output"}
    assert network.conv1.activation[0] == "relu"


def test_a_network_that_cannot_be_traced_is_not_fused():
    assert fuse(randomize(Branches(nn.ReLU()))) is None


def make_prepared(model):
    rng = np.random.default_rng(0)
    split = ImageSet(
        rng.integers(0, 256, (24, 16, 16, 3), dtype=np.uint8),
        rng.integers(0, 5, 24),
        tuple("abcde"),
    )
    x, y = split.tensors()
    plan = make_plan(model, x[:1])
    statistics = collect_statistics(model, plan, image_batches(x, y), seed=0, kinds=set())
    return prepare(model, plan, split, statistics, criterion="l1", recovery="none", seed=0), split


@pytest.mark.parametrize(
    ("model", "is_fused"),
    [
        (Residual(nn.ReLU()), True),
        (Branches(nn.ReLU()), False),
        (CountsChannels(nn.ReLU()), False),
        (WritesInPlace(nn.ReLU()), None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_candidates_score_alike_fused_or_not(model, is_fused, dtype):
    prepared, split = make_prepared(randomize(model))
    cut_network = CutNetwork(prepared, "none")
    network = FastNetwork(cut_network, dtype)
    if dtype == torch.bfloat16 and not HAS_BFLOAT16:
        is_fused = False  # scored all the same, by autocast
    assert is_fused is None or is_fused == (network._fused is not None)
    counts = [max(2, size // 2 + 1) for size in cut_network.plan.cost_model.num_channels]
    logits = network.load(counts, 10)(put_pixels(split), 0, len(split))
    with torch.inference_mode():
        expected = cut_network.load(counts)(split.tensors()[0])
    tolerance = (1e-4 if dtype == torch.float32 else 0.1) * float(expected.abs().max())
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=tolerance)
