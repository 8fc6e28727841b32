"""Rows of a layer's unfolded input and of its output at the same sampled places.

For a convolution a place is an output position, and its input row is the unfolded patch of
C_in * k * k values. For a linear layer a place is a vector along the last dimension. Places are
sampled, as neighbours tell the same thing.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.pruning.torch_types import padding_of

PLAIN_FORWARDS = (nn.Conv2d.forward, nn.Linear.forward)  # a subclass may pad, or compute weights
CHECKED = 64  # places of one image at which another forward is compared with the product


def is_product(module: nn.Module, x: Tensor, y: Tensor) -> bool:
    """Whether output rows are the layer's weight times its input rows, plus its bias.

    A subclass's forward may pad (TensorFlow's "same") or compute the weight: then they are not.
    """
    if type(module).forward in PLAIN_FORWARDS:
        return True
    weight, bias, sides = module.weight, module.bias, _sides(module, x)
    assert isinstance(weight, Tensor)
    if isinstance(module, nn.Conv2d) and y.shape[2:] != sides:
        return False
    total = math.prod(sides)
    places = torch.linspace(0, total - 1, min(total, CHECKED)).long()
    product = take_inputs(module, x[:1], places) @ weight.flatten(1).T
    if isinstance(bias, Tensor):
        product = product + bias
    outputs = take_outputs(module, y[:1], places)
    return outputs.shape == product.shape and bool(
        (outputs - product).abs().max() <= 1e-3 * outputs.abs().max()
    )


def choose_places(
    module: nn.Module, x: Tensor, positions: int, generator: torch.Generator
) -> Tensor:
    """(P,) up to `positions` sampled places, the same for all images of the batch `x`."""
    return torch.randperm(math.prod(_sides(module, x)), generator=generator)[:positions]


def take_inputs(module: nn.Module, x: Tensor, places: Tensor) -> Tensor:
    """Input rows (N * P, D) of a convolution or linear layer, image by image."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), -1, x.shape[-1])[:, places].flatten(0, 1)
    width = _sides(module, x)[1]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, padding_of(module), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    rows = (places // width * sh)[:, None, None] + dh * torch.arange(kh)[:, None]  # (P, kh, 1)
    columns = (places % width * sw)[:, None, None] + dw * torch.arange(kw)  # (P, 1, kw)
    patches = x[:, :, rows, columns]  # (N, C, P, kh, kw)
    return patches.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()


def take_outputs(module: nn.Module, y: Tensor, places: Tensor) -> Tensor:
    """Output rows (N * P, C_out) for the rows of `take_inputs` at the same places."""
    if not isinstance(module, nn.Conv2d):
        return y.reshape(len(y), -1, y.shape[-1])[:, places].flatten(0, 1)
    return y.flatten(2)[:, :, places].transpose(1, 2).flatten(0, 1)


def _sides(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Sizes of the dimensions along which the places of an input lie."""
    if not isinstance(module, nn.Conv2d):
        return x.shape[1:-1]
    left, right, top, bottom = padding_of(module)
    padded = x.shape[2] + top + bottom, x.shape[3] + left + right
    window = zip(padded, module.kernel_size, module.stride, module.dilation, strict=True)
    return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in window)
