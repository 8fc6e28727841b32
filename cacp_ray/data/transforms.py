"""Normalisation of images, and their random crops, flips and erased rectangles."""

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def from_shared(array: NDArray[Any]) -> Tensor:
    """A tensor on the memory of an array that may be read-only: callers must not write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable.*")
        return torch.from_numpy(np.asarray(array))


def to_normalized(
    images: NDArray[np.uint8], mean: tuple[float, ...], std: tuple[float, ...]
) -> Tensor:
    """Images uint8 (N, H, W, C) -> normalised float32 (N, C, H, W), channels_last."""
    return normalize(from_shared(np.ascontiguousarray(images)), mean, std)


def normalize(pixels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """Does what `to_normalized` does with a tensor (N, H, W, C), on its device."""
    x = pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255.0)  # keeps the NHWC memory
    centre, spread = (
        torch.tensor(values, device=x.device).view(1, -1, 1, 1) for values in (mean, std)
    )
    return x.sub_(centre).div_(spread)


def augment(
    images: NDArray[np.uint8],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    generator: torch.Generator,
    padding: int = 4,
) -> Tensor:
    """Normalises images, crops each at random after padding it, and flips half of them.

    Images are handled one by one, so that each stays in the processor's cache: at 224 pixels,
    passes over memory are most of the cost. The padding, in pixels on each side, has the mean
    colour, which is 0 after normalisation.

    uint8 (N, H, W, C) -> float32 (N, C, H, W), channels_last.
    """
    n, height, width, channels = images.shape
    span = 2 * padding + 1
    tops = (torch.randint(span, (n, 1), generator=generator) - padding).view(-1).tolist()
    lefts = (torch.randint(span, (n, 1), generator=generator) - padding).view(-1).tolist()
    flips = (torch.rand(n, 1, generator=generator) < 0.5).view(-1).tolist()
    # Tiled to a row of pixels: numpy is fast along long rows, and slow along channels.
    middle = np.tile(255 * np.array(mean, np.float32), width)
    scale = np.tile(1 / (255 * np.array(std, np.float32)), width)
    x = np.zeros((n, height, width * channels), np.float32)
    for source, target, top, left, flip in zip(images, x, tops, lefts, flips, strict=True):
        mirrored = np.ascontiguousarray(source[:, ::-1]) if flip else source
        start, stop = (-left, width - left) if flip else (left, width + left)
        rows = slice(max(0, top), height + top)
        columns = slice(channels * max(0, start), channels * min(width, stop))
        seen = mirrored.reshape(height, -1)[rows, columns]
        first = channels * max(0, -start)
        window = target[max(0, -top) : height - top, first : first + seen.shape[1]]
        np.subtract(seen, middle[: seen.shape[1]], out=window)
        window *= scale[: seen.shape[1]]
    x = x.reshape(images.shape)
    return torch.from_numpy(x).permute(0, 3, 1, 2)


def erase(x: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Random erasing (Zhong et al., 2020): a rectangle of an image becomes the mean colour.

    Its area is 2 to 33 % of the image, its aspect ratio 0.3 to 3.3, both drawn once; a side longer
    than the image is cut off. Images (N, C, H, W) are normalised.
    """
    n, _, height, width = x.shape
    chosen, area, aspect, top, left = torch.rand(5, n, generator=generator)
    area = (0.02 + 0.31 * area) * height * width
    ratio = (0.3 * 11.0**aspect).sqrt()  # height over that of a square of this area
    h, w = (area.sqrt() * ratio).clamp(max=height), (area.sqrt() / ratio).clamp(max=width)
    y = torch.arange(height) - (top * (height - h))[:, None]  # (N, H), from the rectangle's edge
    z = torch.arange(width) - (left * (width - w))[:, None]  # (N, W)
    is_row, is_column = (y >= 0) & (y < h[:, None]), (z >= 0) & (z < w[:, None])
    inside = is_row[:, :, None] & is_column[:, None, :] & (chosen < probability)[:, None, None]
    return x.masked_fill(inside[:, None], 0.0)
