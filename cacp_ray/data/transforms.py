"""Batch transforms on tensors: normalisation, and the usual CIFAR augmentation."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional


def from_shared(array: NDArray[Any]) -> Tensor:
    """A tensor on the array's own memory, which may be read-only: nothing here writes to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.asarray(array))


def to_normalized(
    images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """uint8 (N, H, W, 3) -> float32 (N, 3, H, W), channels_last, normalised."""
    x = from_shared(np.ascontiguousarray(images)).permute(0, 3, 1, 2)  # NHWC memory stays
    x = x.to(torch.float32).div_(255.0)
    return x.sub_(torch.tensor(mean).view(1, -1, 1, 1)).div_(torch.tensor(std).view(1, -1, 1, 1))


def augment(x: Tensor, generator: torch.Generator, padding: int = 4) -> Tensor:
    """Random crop with zero padding, and a horizontal flip half of the time, one draw an image.

    Args:
        x: (N, C, H, W), already normalised, so the padding is the mean colour.
        generator: The only source of randomness.
        padding: Pixels added on each side before the crop.
    """
    n, _, height, width = x.shape
    padded = functional.pad(x, (padding,) * 4)
    span = 2 * padding + 1
    top = torch.randint(span, (n, 1), generator=generator)
    left = torch.randint(span, (n, 1), generator=generator)
    flip = torch.rand(n, 1, generator=generator) < 0.5
    columns = torch.arange(width)
    columns = torch.where(flip, width - 1 - columns, columns) + left  # (N, W)
    rows = torch.arange(height) + top  # (N, H)
    image = torch.arange(n).view(n, 1, 1)
    # Advanced indexing on the channels-last view keeps the fast memory layout.
    return padded.permute(0, 2, 3, 1)[image, rows[:, :, None], columns[:, None, :]].permute(
        0, 3, 1, 2
    )


def erase(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., 2020): a rectangle of an image becomes the mean colour.

    Its area is 2 to 33 % of the image, its sides are as 0.3 to 3.3, one draw an image; what would
    stand out of the image is cut off.

    Args:
        x: (N, C, H, W), already normalised.
        probability: Of each image.
        generator: The only source of randomness.
    """
    n, _, height, width = x.shape
    chosen, area, aspect, top, left = torch.rand(5, n, generator=generator)
    area = (0.02 + 0.31 * area) * height * width
    ratio = (0.3 * 11.0**aspect).sqrt()  # of the height to that of a square, 0.3 to 3.3 squared
    h, w = (area.sqrt() * ratio).clamp(max=height), (area.sqrt() / ratio).clamp(max=width)
    y = torch.arange(height) - (top * (height - h))[:, None]  # (N, H), from the rectangle's edge
    z = torch.arange(width) - (left * (width - w))[:, None]  # (N, W)
    is_row, is_column = (y >= 0) & (y < h[:, None]), (z >= 0) & (z < w[:, None])
    inside = is_row[:, :, None] & is_column[:, None, :] & (chosen < probability)[:, None, None]
    return x.masked_fill(inside[:, None], 0.0)
