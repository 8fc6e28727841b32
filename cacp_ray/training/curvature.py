"""The learning rate that a network bears: half the inverse of the largest curvature of its loss.

Steps of gradient descent grow along a direction of curvature c when the rate exceeds 2 / c, and
momentum and the noise of small batches ask for less. A network that was trained for long has small
weights and large outputs, so the curvature of its loss is ten times that of a young one, and the
rate that suits one throws the other far back (docs/finetuning.md).

Source: LeCun, Simard and Pearlmutter, "Automatic learning rate maximization by on-line estimation
of the Hessian's eigenvectors" (1993), who take the inverse. Ours: the half, and central differences
of gradients of some batches, so that any layer can be used.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.training.metrics import Split, find_device
from cacp_ray.training.objective import objective, soft_labels
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)

IMAGES = 256
BATCH = 64  # at most; the recipe's may be smaller
ITERATIONS = 6  # of the power method; the next ones change the value by some per cent
SHARE = 0.5  # of the inverse curvature
HIGHEST, USUAL = 0.25, 0.02  # a rate is never above the first; the second where none is found
STEP = 1e-3  # of the differences, relative to the norm of the weights
Batch = tuple[Tensor, Tensor, Tensor | None]  # images, classes, soft labels


def find_rate(
    model: nn.Module, images: Split, recipe: Recipe, teacher: nn.Module | None = None
) -> float:
    """Half the inverse of the largest curvature of the training loss, with two digits.

    Args:
        model: The network as training finds it; it stays as it is.
        images: Training images; 256 of them are used, evenly spaced and as they are.
        recipe: The loss: label smoothing, distillation, temperature.
        teacher: Source of soft labels; None without distillation.

    Returns:
        At most 0.25; 0.02 where the curvature cannot be measured.
    """
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        return USUAL
    batches = list(_draw(images, find_device(model), recipe, teacher))
    with _kept(model, weights) as origin:
        curvature = _measure(model, weights, origin, batches, recipe)
    if not 0 < curvature < math.inf:
        logger.warning("the curvature of the training loss is %g: lr is %g", curvature, USUAL)
        return USUAL
    rate = min(HIGHEST, float(f"{SHARE / curvature:.1e}"))
    logger.debug("largest curvature of the training loss %.3g: learning rate %g", curvature, rate)
    return rate


def _draw(
    images: Split, device: torch.device, recipe: Recipe, teacher: nn.Module | None
) -> Iterator[Batch]:
    """Batches of at least two images: BN may have no other values to normalise by."""
    count = min(IMAGES, len(images))
    rows = np.arange(count) * len(images) // count  # images may be sorted by class
    size = max(2, min(BATCH, recipe.batch_size))
    for first in range(0, count, size):
        chosen = rows[first : first + size]
        if len(chosen) > 1:
            x, y = (part.to(device) for part in images.at(chosen).tensors())
            yield x, y, soft_labels(teacher, x, recipe, torch.float32)


@contextmanager
def _kept(model: nn.Module, weights: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """The weights, which may be changed, as may statistics; all are put back at the end."""
    origin = [weight.detach().clone() for weight in weights]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        yield origin
    finally:
        with torch.no_grad():
            for weight, start in zip(weights, origin, strict=True):
                weight.copy_(start)
            for buffer, start in buffers:
                buffer.copy_(start)
        for module, mode in modes:
            module.training = mode


def _measure(
    model: nn.Module,
    weights: list[nn.Parameter],
    origin: list[Tensor],
    batches: list[Batch],
    recipe: Recipe,
) -> float:
    """The largest curvature by the power method; 0 or not finite where there is none."""
    size = max(_norm(origin), 1.0)  # a network of zeros has a curvature too
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, generator=generator).to(w.device) for w in weights]
    curvature = math.nan
    for _ in range(ITERATIONS):
        length = _norm(direction)
        if not 0 < length < math.inf:
            break
        step = STEP * size / length
        sides: list[list[Tensor]] = []
        for signed in (step, -step):
            with torch.no_grad():
                for weight, start, way in zip(weights, origin, direction, strict=True):
                    weight.copy_(start + signed * way)
            sides.append(_gradient(model, weights, batches, recipe))
        direction = [(a - b) / (2 * step * length) for a, b in zip(*sides, strict=True)]
        curvature = _norm(direction)
    return curvature


def _gradient(
    model: nn.Module, weights: list[nn.Parameter], batches: list[Batch], recipe: Recipe
) -> list[Tensor]:
    """Mean gradient at the present weights."""
    total = [torch.zeros_like(weight) for weight in weights]
    for x, y, target in batches:
        torch.manual_seed(0)  # the same dropout on both sides
        loss = objective(model, x, y, recipe, target, dtype=torch.float32) / len(batches)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        total = [
            so_far if gradient is None else so_far + gradient
            for so_far, gradient in zip(total, gradients, strict=True)
        ]
    return total


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.pow(2).sum() for tensor in tensors]).sum().sqrt())
