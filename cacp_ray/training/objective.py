"""The loss of training: true labels, soft labels of a teacher, auxiliary heads, mixed images."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from cacp_ray.errors import EvaluationError
from cacp_ray.training.metrics import fast_dtype
from cacp_ray.training.recipe import Recipe

MAIN = ("out", "logits")  # names of the main head's scores in a dictionary
AUXILIARY = 0.3  # weight of the loss of an auxiliary head (Szegedy et al., 2015, section 5)


def fast_autocast(device: str, dtype: torch.dtype | None = None) -> torch.autocast:
    """Autocast to `dtype`; None is bfloat16 where the device multiplies it natively."""
    dtype = dtype or fast_dtype(device)
    return torch.autocast(device, dtype=dtype, enabled=dtype != torch.float32)


def objective(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    target: Tensor | None = None,
    *,
    share: float = 1.0,
    other: Any = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The loss of a network in training mode on images (N, C, H, W) of classes (N,).

    Args:
        model: The network.
        x: Images, mixed already where they are mixed.
        y: Their classes.
        recipe: Label smoothing, distillation and temperature.
        target: (N, C) the teacher's scores, see `soft_labels`; None without distillation.
        share: Weight of the own class of a mixed image.
        other: (N,) which image each was mixed with; None without mixing.
        dtype: Of the products, see `fast_autocast`.
    """
    autocast = fast_autocast(x.device.type, dtype)
    cross_entropy = partial(functional.cross_entropy, label_smoothing=recipe.label_smoothing)
    with autocast:
        logits, *auxiliary = read_scores(model(x), partial(count_classes, model, x[:1]))
    loss = torch.zeros((), device=x.device)
    for weight, scores in [(1.0, logits), *((AUXILIARY, scores) for scores in auxiliary)]:
        loss = loss + weight * share * cross_entropy(scores, y)
        if other is not None:
            loss = loss + weight * (1 - share) * cross_entropy(scores, y[other])
    if target is not None:
        soft = distillation_loss(logits, target, recipe.temperature)
        loss = (1 - recipe.distillation) * loss + recipe.distillation * soft
    return loss


def soft_labels(
    teacher: nn.Module | None, x: Tensor, recipe: Recipe, dtype: torch.dtype | None = None
) -> Tensor | None:
    """(N, C) scores of the teacher in float32; None where the recipe does not distil."""
    if teacher is None or recipe.distillation == 0:
        return None
    with torch.no_grad(), fast_autocast(x.device.type, dtype):
        return teacher(x).float()


def count_classes(model: nn.Module, x: Tensor) -> int:
    """Columns of the class scores that a network returns in evaluation mode."""
    model.eval()
    with torch.no_grad():
        output = model(x)
    model.train()
    return int(output.shape[-1])


def read_scores(output: Any, num_classes: Callable[[], int]) -> list[Tensor]:
    """Class scores (N, C) in float32 from what a network returns in training mode.

    The main head's come first: of a dictionary those named `out` or `logits`, else the first with a
    column for each class. The others are of auxiliary heads, as of GoogLeNet, which returns a named
    tuple of them.

    Raises:
        EvaluationError: There are none.
    """
    if isinstance(output, Tensor):
        return [output.float()]
    if isinstance(output, dict):  # sorted sorts what is False first
        output = [output[key] for key in sorted(output, key=lambda key: key not in MAIN)]
    leaves, columns = tree_leaves(output), num_classes()
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim == 2]
    scores = [tensor.float() for tensor in tensors if tensor.shape[1] == columns]
    if not scores:
        raise EvaluationError(
            f"in training mode the network returns a {type(output).__name__} without class scores "
            "of shape (images, classes): train it by your own code"
        )
    return scores


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened outputs (Hinton et al., 2015, section 2)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(
        student, teacher, log_target=True, reduction="batchmean"
    )
