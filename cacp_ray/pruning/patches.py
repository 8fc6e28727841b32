"""Rows of a layer's unfolded input and of its output at the same sampled places.

For a convolution a place is an output position, its input row the unfolded patch (C_in * k * k
values); for a linear layer a place is a vector along the last dimension. Places are sampled, as
neighbours tell the same thing.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

PLAIN = (nn.Conv2d.forward, nn.Linear.forward)  # subclasses may pad or compute weights
CHECKED = 64  # places of one image at which another forward is compared with the product


def is_product(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether output rows are the layer's weight times its input rows, plus its bias.

    Not so where a forward of its own pads (TensorFlow's "same") or computes the weight.
    """
    if type(module).forward in PLAIN:
        return True
    weight, bias = module.weight, module.bias
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv2d):
        sides = _sides(module, _pad(module, x))
        if tuple(y.shape[2:]) != sides:
            return False
        total = sides[0] * sides[1]
    else:
        total = x.shape[1:-1].numel()
    places = torch.linspace(0, total - 1, min(total, CHECKED)).long()
    product = take_inputs(module, x[:1], places) @ weight.flatten(1).T
    if isinstance(bias, Tensor):
        product = product + bias
    real = take_outputs(module, y[:1], places)
    return real.shape == product.shape and bool(
        (real - product).abs().max() <= 1e-3 * real.abs().max()
    )


def choose_places(
    module: nn.Module, x: Tensor, positions: int, generator: torch.Generator
) -> Tensor:
    """(P,) up to `positions` places of one image, the same for all images of the batch `x`."""
    if isinstance(module, nn.Conv2d):
        height, width = _sides(module, _pad(module, x))
        total = height * width
    else:
        total = x.shape[1:-1].numel()
    return torch.randperm(total, generator=generator)[:positions]


def take_inputs(module: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Input rows (N * P, D) of a convolution or linear layer, image by image."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1])[:, places].flatten(0, 1)
    x = _pad(module, x)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    width = _sides(module, x)[1]
    rows = (places // width * sh)[:, None, None] + dh * torch.arange(kh)[:, None]  # (P, kh, 1)
    columns = (places % width * sw)[:, None, None] + dw * torch.arange(kw)  # (P, 1, kw)
    patches = x[:, :, rows, columns]  # (N, C, P, kh, kw)
    return patches.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


def take_outputs(module: nn.Module, y: Tensor, places: Tensor) -> Tensor:
    """Output rows (N * P, C_out) that belong to `take_inputs` of the same places."""
    if not isinstance(module, nn.Conv2d):
        return y.reshape(len(y), -1, y.shape[-1])[:, places].flatten(0, 1)
    return y.flatten(2)[:, :, places].transpose(1, 2).flatten(0, 1)


def _sides(module: nn.Conv2d, padded: Tensor) -> tuple[int, int]:
    """Height and width of the output."""
    window = zip(padded.shape[2:], module.kernel_size, module.stride, module.dilation, strict=True)
    height, width = ((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in window)
    return height, width


def _pad(module: nn.Conv2d, x: Tensor) -> Tensor:
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
