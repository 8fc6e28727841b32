"""Sizes that modules keep in attributes follow a cut by their meaning, never by coincidence."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import cacp_ray

X = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    """A block without tensors of its own that keeps its widths as numbers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = inputs, outputs
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu()


class Branches(nn.Module):
    """Two branches that fuse into one convolution, built from the numbers that the block keeps."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = channels, outputs
        self.large = nn.Conv2d(channels, outputs, 3, padding=1)
        self.small = nn.Conv2d(channels, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.large(x) + self.small(x)).relu()

    def fuse(self) -> nn.Conv2d:
        fused = nn.Conv2d(self.in_channels, self.out_channels, 3, padding=1)
        with torch.no_grad():
            wide = functional.pad(self.small.weight, [1, 1, 1, 1])
            fused.weight.copy_(self.large.weight + wide)
            fused.bias.copy_(self.large.bias + self.small.bias)
        return fused


class Gate(nn.Module):
    """A parameter of 16 channels, and 16 rows to pool to: the same number by chance."""

    def __init__(self, *, pools: bool) -> None:
        super().__init__()
        self.gamma, self.rows, self.pools = nn.Parameter(torch.rand(16)), 16, pools
        self.channels = 16

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.gamma.view(1, self.channels, 1, 1)
        return functional.adaptive_avg_pool2d(x, self.rows) if self.pools else x


def head(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 3)]


@pytest.mark.parametrize("pools", [False, True])
def test_a_number_that_equals_a_width_by_chance_stays(pools):
    net = nn.Sequential(Conv(3, 16), Gate(pools=pools), Conv(16, 8), *head(8)).eval()
    analysis = cacp_ray.analyze(net, X)
    assert "0.conv" not in analysis.plan.fixed
    small = analysis.build([5, 3])
    assert (small[1].rows, small[1].channels) == (16, 5)
    assert (small[0].in_channels, small[0].out_channels) == (3, 5)
    assert (small[2].in_channels, small[2].out_channels) == (5, 3)
    assert small(X).shape == (1, 3)


def test_a_block_that_was_cut_fuses_to_what_it_computes():
    net = nn.Sequential(Conv(3, 16), Branches(16, 16), *head(16)).eval()
    analysis = cacp_ray.analyze(net, X)
    small = analysis.build(analysis.plan.least_counts + 3)
    inside = small[0](X)
    fused = small[1].fuse()
    assert fused.weight.shape[:2] == small[1].large.weight.shape[:2]
    torch.testing.assert_close(fused(inside).relu(), small[1](inside))


class Parts(nn.Module):
    """A depthwise branch beside the input's own norm; both fuse, with a part for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dim, self.groups, self.in_chs = channels, channels, channels
        self.mixer = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm = Norm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x) + self.norm(x)

    def fuse(self) -> nn.Conv2d:
        fused = nn.Conv2d(self.in_chs, self.dim, 3, padding=1, groups=self.groups)
        kernel, bias = self.norm.fuse()
        with torch.no_grad():
            fused.weight.copy_(self.mixer.weight + kernel)
            fused.bias.copy_(self.mixer.bias + bias)
        return fused


class Norm(nn.Module):
    """A block that consists of a norm alone, and knows its channels and parts."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.in_chs, self.out_chs, self.groups = channels, channels, channels
        self.bn = nn.BatchNorm2d(channels)
        nn.init.uniform_(self.bn.weight, 0.5, 1.5)
        self.bn.running_var.uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x)

    def fuse(self) -> tuple[Tensor, Tensor]:
        kernel = torch.zeros(self.out_chs, self.in_chs // self.groups, 3, 3)
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        kernel[:, 0, 1, 1] = scale
        return kernel, self.bn.bias - self.bn.running_mean * scale


def test_blocks_of_a_part_a_channel_fuse_after_a_cut():
    torch.manual_seed(0)
    net = nn.Sequential(Conv(3, 16), Parts(16), *head(16)).eval()
    analysis = cacp_ray.analyze(net, X)
    small = analysis.build([5])
    inside = small[0](X)
    torch.testing.assert_close(small[1].fuse()(inside), small[1](inside))
