"""CIFAR networks with the parameter names of published weights, so that those load.

Sources: ResNet for CIFAR (He et al., 2016, section 4.2: 6n+2 layers, widths 16/32/64), with
shortcuts of 1x1 convolution + BN, or with shortcuts without parameters (option A there): every
second pixel, and channels of zeros around the others. VGG-16 with BN and one linear layer (after
Simonyan and Zisserman, 2015).
"""

from torch import Tensor, nn
from torch.nn import functional


class PaddingShortcut(nn.Module):
    """Every second pixel, and as many channels of zeros before as after the others."""

    def __init__(self, added: int) -> None:
        super().__init__()
        self.added = added

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C + added, H/2, W/2)."""
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.added // 2, self.added // 2))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BN and a residual sum."""

    def __init__(self, in_channels: int, channels: int, stride: int, is_padded: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if is_padded and in_channels != channels:
            self.downsample = PaddingShortcut(channels - in_channels)
        elif stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(N, C_in, H, W) -> (N, C, H/stride, W/stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """ResNet of 6n+2 layers for 32x32 images: three stages of widths 16, 32, 64."""

    classifier = "fc"  # its name among the parameters
    is_padded = False  # whether shortcuts add channels of zeros

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.add_module(self.classifier, nn.Linear(64, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _stage(self, in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        others = (BasicBlock(channels, channels, 1, self.is_padded) for _ in range(blocks - 1))
        return nn.Sequential(BasicBlock(in_channels, channels, stride, self.is_padded), *others)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, num_classes)."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.get_submodule(self.classifier)(self.avgpool(x).flatten(1))


class PaddedCifarResNet(CifarResNet):
    """The same with shortcuts without parameters, and with the names of their published weights."""

    classifier = "linear"
    is_padded = True


VGG16_WIDTHS = (64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512)


class CifarVGG16(nn.Module):
    """VGG-16 with BN for 32x32 images and a single linear classifier."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for width in VGG16_WIDTHS:
            if isinstance(width, str):
                layers.append(nn.MaxPool2d(2))
                continue
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, 32, 32) -> logits (N, num_classes)."""
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
