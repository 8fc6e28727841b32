"""The learning rate that a network bears: half the inverse of the largest curvature of its loss.

Steps of gradient descent grow along a direction of curvature c when the rate exceeds 2 / c, and
momentum and the noise of small batches ask for less. A network that was trained for long has small
weights and large outputs, so the curvature of its loss is ten times that of a young one, and the
rate that suits one throws the other far back (docs/trained.md).

Source: LeCun, Simard and Pearlmutter, "Automatic learning rate maximization by on-line estimation
of the Hessian's eigenvectors" (1993), who take the inverse. Ours: the half, and central differences
of gradients of a few hundred images, so that any layer can be used and memory is that of training.
"""

import copy
import logging
from itertools import islice

import torch
from torch import Tensor, nn

from cacp_ray.training.metrics import Split, find_device
from cacp_ray.training.objective import objective
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)

IMAGES = 256
BATCH = 64
ITERATIONS = 8  # of the power method; the last one changes the value by some per cent
SHARE = 0.5  # of the inverse curvature
STEP = 1e-3  # of the differences, relative to the norm of the weights


def find_rate(
    model: nn.Module, images: Split, recipe: Recipe, teacher: nn.Module | None = None
) -> float:
    """Half the inverse of the largest curvature of the training loss, with two digits.

    Args:
        model: The network as training finds it; it stays as it is.
        images: Training images; the first 256 are used, as they are.
        recipe: The loss: label smoothing, distillation, temperature.
        teacher: Source of soft labels; None without distillation.
    """
    probe = copy.deepcopy(model).train()
    device = find_device(probe)
    batches = [
        (x.to(device), y.to(device))
        for x, y in (part.tensors() for part in islice(images.parts(BATCH), IMAGES // BATCH))
    ]
    weights = [p for p in probe.parameters() if p.requires_grad]
    origin = [weight.detach().clone() for weight in weights]
    size = max(_norm(origin), 1.0)  # a network of zeros has a curvature too
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(weight.shape, generator=generator).to(device) for weight in weights]
    curvature = 0.0
    for _ in range(ITERATIONS):
        length = _norm(direction)
        step = STEP * size / length
        ahead = _gradient(probe, weights, origin, direction, step, batches, recipe, teacher)
        behind = _gradient(probe, weights, origin, direction, -step, batches, recipe, teacher)
        direction = [(a - b) / (2 * step * length) for a, b in zip(ahead, behind, strict=True)]
        curvature = _norm(direction)
    rate = float(f"{SHARE / max(curvature, 1e-6):.1e}")
    logger.debug("largest curvature of the training loss %.3g: learning rate %g", curvature, rate)
    return rate


def _gradient(
    probe: nn.Module,
    weights: list[nn.Parameter],
    origin: list[Tensor],
    direction: list[Tensor],
    step: float,
    batches: list[tuple[Tensor, Tensor]],
    recipe: Recipe,
    teacher: nn.Module | None,
) -> list[Tensor]:
    """Mean gradient at a distance from the weights."""
    with torch.no_grad():
        for weight, start, way in zip(weights, origin, direction, strict=True):
            weight.copy_(start + step * way)
    total = [torch.zeros_like(weight) for weight in weights]
    for x, y in batches:
        torch.manual_seed(0)  # the same dropout on both sides
        loss = objective(probe, x, y, recipe, teacher, dtype=torch.float32) / len(batches)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        total = [
            sum_ if gradient is None else sum_ + gradient
            for sum_, gradient in zip(total, gradients, strict=True)
        ]
    return total


def _norm(tensors: list[Tensor]) -> float:
    return float(torch.stack([tensor.pow(2).sum() for tensor in tensors]).sum().sqrt())
