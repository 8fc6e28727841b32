"""One small network for each way in which code couples channels."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


def conv(width_in: int, width: int, kernel: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(width_in, width, kernel, padding=kernel // 2, **options)


class Net(nn.Module):
    """Two convolutions, something between them, a classifier."""

    def __init__(self, between: nn.Module, width_in: int = 8, width: int = 8) -> None:
        super().__init__()
        self.first = conv(3, width_in)
        self.between = between
        self.last = conv(width, 6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.between(self.first(x).relu()))
        return self.fc(x.mean((2, 3)))


class Fn(nn.Module):
    """A network whose forward is a function of tensors, with the modules that it uses."""

    def __init__(
        self, function: Callable[..., Tensor], **modules: nn.Module | nn.Parameter
    ) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Blur(nn.Module):
    """A fixed filter for each channel, in no state dict; an attribute holds its width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        filt = torch.tensor([1.0, 2.0, 1.0]).outer(torch.tensor([1.0, 2.0, 1.0])) / 16
        self.register_buffer("filt", filt.expand(channels, 1, 3, 3).clone(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.conv2d(x, self.filt, stride=2, padding=1, groups=self.channels)


class Standardised(nn.Conv2d):
    """Weight standardisation with a gain for each filter, as in normaliser-free networks."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__(width_in, width, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(width, 1, 1, 1) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight = functional.batch_norm(
            self.weight.reshape(1, self.out_channels, -1), None, None,
            weight=(self.gain * 0.3).view(-1), training=True,
        ).reshape_as(self.weight)  # fmt: skip
        return functional.conv2d(x, weight, self.bias, padding=1)


def tied(layers: nn.Sequential) -> nn.Sequential:
    layers[-1].weight = layers[0].weight
    return layers


def chunked(self: nn.Module, x: Tensor) -> Tensor:
    left, right = x.chunk(2, 1)
    return functional.channel_shuffle(torch.cat([left, self.conv(right)], 1), 2)


def split_by_number(self: nn.Module, x: Tensor) -> Tensor:
    left, right = x.split((3, 5), 1)
    return torch.cat([right, left], 1)


def written(self: nn.Module, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], 2 * x.shape[1], *x.shape[2:])
    y[:, : x.shape[1]] = x
    y[:, x.shape[1] :] = x + self.conv(x)
    return y


def spatial_gate(self: nn.Module, x: Tensor) -> Tensor:
    maps = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
    return x * self.conv(maps).sigmoid()


def padded(self: nn.Module, x: Tensor) -> Tensor:
    return self.conv(x) + functional.pad(x[:, :, ::1, ::1], (0, 0, 0, 0, 2, 2))


def across(self: nn.Module, x: Tensor) -> Tensor:
    gate = self.conv(x.mean((2, 3)).unsqueeze(1)).sigmoid()
    return x * gate.view(x.shape[0], -1, 1, 1)


def pooled_attention(self: nn.Module, x: Tensor) -> Tensor:
    share = self.mask(x).flatten(2).softmax(-1)  # (N, 1, H * W)
    context = torch.matmul(x.flatten(2), share.transpose(1, 2))  # (N, C, 1)
    return x + self.conv(context.unsqueeze(-1))


def one_size(self: nn.Module, x: Tensor) -> Tensor:
    return self.conv(x).reshape(-1, self.width, *x.shape[2:]) + 1


def hard_coded(self: nn.Module, x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], 8, *x.shape[2:])


def radix(self: nn.Module, x: Tensor) -> Tensor:
    parts = self.conv(x).unflatten(1, (2, -1))  # two branches of one convolution
    gate = parts.sum(1).mean((2, 3), keepdim=True).sigmoid()
    return (parts * gate.unsqueeze(1)).sum(1)


def decode(self: nn.Module, x: Tensor) -> Tensor:
    return self.linear(x.mean((2, 3))).view(x.shape[0], -1, 4, 4)


# name -> (network, groups, layers that stay whole although something follows them)
COUPLINGS: dict[str, tuple[Callable[[], nn.Module], set[str], set[str]]] = {
    "many narrow parts": (
        lambda: Net(conv(8, 16, groups=4), width=16), {"first", "last"}, set()),
    "few wide parts": (
        lambda: Net(conv(8, 12, groups=2), width=12), {"first", "between", "last"}, set()),
    "depthwise with multiplier": (
        lambda: Net(conv(8, 16, groups=8), width=16), {"first", "last"}, set()),
    "transposed": (
        lambda: Net(nn.ConvTranspose2d(8, 6, 2, stride=2), width=6),
        {"first", "between", "last"}, set()),
    "transposed depthwise": (
        lambda: Net(nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)), {"first", "last"}, set()),
    "group norm, narrow parts": (lambda: Net(nn.GroupNorm(4, 8)), {"first", "last"}, set()),
    "group norm, wide parts": (lambda: Net(nn.GroupNorm(2, 8)), {"first", "last"}, set()),
    "layer norm over channels": (
        lambda: Net(Fn(lambda s, x: s.norm(x.movedim(1, -1)).movedim(-1, 1),
                       norm=nn.LayerNorm(8))), {"first", "last"}, set()),
    "instance norm": (
        lambda: Net(nn.InstanceNorm2d(8, affine=True)), {"first", "last"}, set()),
    "a layer used twice": (
        lambda: Net(Fn(lambda s, x: s.conv(s.conv(x).relu()), conv=conv(8, 8))),
        {"first", "last"}, set()),
    "tied weights": (
        lambda: Net(tied(nn.Sequential(conv(8, 8), nn.ReLU(), conv(8, 8)))),
        {"first", "last"}, set()),
    "pixel shuffle": (lambda: Net(nn.PixelShuffle(2), width=2), {"first", "last"}, set()),
    "circular padding": (lambda: Net(nn.CircularPad2d(1)), {"first", "last"}, set()),
    "blur": (lambda: Net(Blur(8)), {"first", "last"}, set()),
    "standardised weights": (
        lambda: Net(Standardised(8, 10), width=10), {"first", "between", "last"}, set()),
    "scalar gain": (
        lambda: Net(Fn(lambda s, x: x * s.gain, gain=nn.Parameter(torch.tensor(0.7)))),
        {"first", "last"}, set()),
    "position bias": (
        lambda: Net(Fn(lambda s, x: x + s.bias, bias=nn.Parameter(torch.rand(1, 1, 8, 8)))),
        {"first", "last"}, set()),
    "layer scale": (
        lambda: Net(Fn(lambda s, x: x * s.scale, scale=nn.Parameter(torch.rand(8, 1, 1)))),
        {"first", "last"}, set()),
    "prelu": (lambda: Net(nn.PReLU(8)), {"first", "last"}, set()),
    "chunk and shuffle": (
        lambda: Net(Fn(chunked, conv=conv(4, 4))), {"first", "last"}, set()),
    "split by number": (lambda: Net(Fn(split_by_number)), {"last"}, {"first"}),
    "written in place": (
        lambda: Net(Fn(written, conv=conv(8, 8)), width=16),
        {"first", "last"}, set()),
    "relu of a view": (
        lambda: Net(Fn(lambda s, x: (x.flatten(2).add_(1.0), x)[1])), {"first", "last"}, set()),
    "gate over places": (
        lambda: Net(Fn(spatial_gate, conv=conv(2, 1))), {"first", "last"}, {"between.conv"}),
    "padded shortcut": (
        lambda: Net(Fn(padded, conv=conv(8, 12)), width=12), {"first", "last"}, set()),
    "filter across channels": (
        lambda: Net(Fn(across, conv=nn.Conv1d(1, 1, 3, padding=1, bias=False))),
        {"last"}, {"first"}),
    "constants a place": (
        lambda: Net(Fn(lambda s, x: x * torch.arange(1, x.shape[1] + 1).view(1, -1, 1, 1) / 3)),
        {"last"}, {"first"}),
    "gated linear unit": (
        lambda: Net(Fn(lambda s, x: functional.glu(s.conv(x), 1), conv=conv(8, 12)), width=6),
        {"first", "between.conv", "last"}, set()),
    "size in an attribute": (
        lambda: Net(Fn(one_size, conv=conv(2, 2), width=2), 2, 2),
        {"first", "last"}, {"between.conv"}),
    "attention that pools": (
        lambda: Net(Fn(pooled_attention, mask=conv(8, 1, 1), conv=conv(8, 8, 1))),
        {"first", "last"}, {"between.mask"}),
    "size in the code": (lambda: Net(Fn(hard_coded)), {"last"}, {"first"}),
    "maps from a linear layer": (
        lambda: Net(Fn(decode, linear=nn.Linear(8, 6 * 16)), width=6),
        {"first", "between.linear", "last"}, set()),
    "branches of one layer": (
        lambda: Net(Fn(radix, conv=conv(8, 16))), {"first", "between.conv", "last"}, set()),
}  # fmt: skip
NORMALISED = {
    "group norm, wide parts", "layer norm over channels", "standardised weights",
    "gate over places",
}  # fmt: skip


def blurred(num_classes: int) -> nn.Module:
    return COUPLINGS["blur"][0]()


def tied_weights(num_classes: int) -> nn.Module:
    return COUPLINGS["tied weights"][0]()
