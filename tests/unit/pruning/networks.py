"""Small networks with the couplings that real networks have."""

import torch
from torch import Tensor, nn

from cacp_ray.models.cifar import CifarResNet, PaddedCifarResNet


class Plain(nn.Sequential):
    """VGG-like: convolution, BN and pooling in a row."""

    def __init__(self, num_classes: int = 5) -> None:
        layers: list[nn.Module] = []
        for width_in, width in ((3, 8), (8, 12), (12, 16)):
            layers += [nn.Conv2d(width_in, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        pool = [nn.MaxPool2d(2), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        super().__init__(*layers, *pool, nn.Linear(16, num_classes))


class Concat(nn.Module):
    """Two branches concatenated, then flattened into a linear layer."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 6, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1, bias=False)
        self.norm = nn.BatchNorm2d(10)
        self.mix = nn.Conv2d(10, 8, 3, stride=2)
        self.fc = nn.Linear(8 * 3 * 3, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.fc(self.mix(self.norm(x).relu()).relu().flatten(1))


class Depthwise(nn.Module):
    """Inverted residual with depthwise convolution and squeeze-and-excitation."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.expand = nn.Conv2d(8, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.depth = nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.squeeze = nn.Conv2d(24, 6, 1)
        self.excite = nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 8, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.bn1(self.expand(x)).relu()
        y = self.bn2(self.depth(y)).relu()
        gate = self.excite(self.squeeze(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
        x = x + self.bn3(self.project(y * gate))
        return self.head(x.mean((2, 3)))


class Twice(nn.Module):
    """One layer that reads the same channels at two stages."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.shared = nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.shared(x).relu()
        x = x + self.shared(x).relu()
        return self.head(x.mean((2, 3)))


def make(name: str) -> tuple[nn.Module, Tensor]:
    """A network with random weights and BN statistics, and an example input."""
    torch.manual_seed(0)
    model, side = {
        "resnet": (lambda: CifarResNet(8), 16),
        "padding": (lambda: PaddedCifarResNet(8), 16),
        "plain": (Plain, 8),
        "concat": (Concat, 8),
        "depthwise": (Depthwise, 8),
    }[name]
    net = model().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
    return net, torch.randn(2, 3, side, side)


NAMES = ("resnet", "padding", "plain", "concat", "depthwise")
