"""One epoch loop for base training and fine-tuning, with distillation and exact resume.

The order of images, the crops, the flips and the dropout of an epoch depend on (seed, epoch) alone,
so a run that is continued from an epoch's end repeats what the uninterrupted run would have done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.data.transforms import augment
from cacp_ray.training.metrics import Accuracy, fast_dtype, measure
from cacp_ray.training.optimizer import SGD
from cacp_ray.training.recipe import Recipe


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch; `search` is the accuracy on the search split."""

    epoch: int
    train_loss: float
    search: Accuracy


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Rate of step `step` of `num_steps`."""
    warm = max(1, round(recipe.warmup * num_steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, num_steps - warm)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, recipe: Recipe) -> SGD:
    """SGD; biases and BN parameters are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def train_epoch(
    model: nn.Module,
    optimizer: SGD,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    epoch: int,
    *,
    teacher: nn.Module | None = None,
) -> float:
    """Trains one epoch (counted from 0) and returns its mean loss.

    Args:
        model: Trained in place.
        optimizer: Of `model`; its learning rate is set before every step.
        images: Normalised (N, C, H, W).
        labels: (N,).
        recipe: Settings of the whole schedule.
        epoch: Index of this epoch in [0, recipe.epochs).
        teacher: Base model for distillation; needed where `recipe.distillation` > 0.
    """
    epoch_seed = recipe.seed * 100_003 + epoch
    torch.manual_seed(epoch_seed)  # dropout
    generator = torch.Generator().manual_seed(epoch_seed)
    order = torch.randperm(len(labels), generator=generator)
    batches = order.split(recipe.batch_size)
    dtype = fast_dtype()
    autocast = torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32)
    total = 0.0
    model.train()
    for number, index in enumerate(batches):
        rate = learning_rate(recipe, epoch * len(batches) + number, recipe.epochs * len(batches))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = augment(images[index], generator, recipe.padding)
        y = labels[index]
        with autocast:
            logits = model(x).float()
        loss = functional.cross_entropy(logits, y, label_smoothing=recipe.label_smoothing)
        if teacher is not None and recipe.distillation > 0:
            with torch.no_grad(), autocast:
                target = teacher(x).float()
            soft = distillation_loss(logits, target, recipe.temperature)
            loss = (1 - recipe.distillation) * loss + recipe.distillation * soft
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        total += loss.item() * len(y)
    return total / len(labels)


def distillation_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of softened outputs (Hinton et al., 2015, section 2)."""
    student = functional.log_softmax(logits / temperature, dim=1)
    teacher = functional.log_softmax(teacher_logits / temperature, dim=1)
    return temperature**2 * functional.kl_div(
        student, teacher, log_target=True, reduction="batchmean"
    )


def train(
    model: nn.Module,
    train_split: tuple[Tensor, Tensor],
    search_split: tuple[Tensor, Tensor],
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochResult, dict[str, Any]], None] | None = None,
) -> None:
    """Trains `model` in place through the whole schedule, or from `state` to its end.

    Args:
        model: Moved to channels_last.
        train_split: Normalised images and labels to learn from.
        search_split: Normalised images and labels that each epoch is measured on.
        recipe: Schedule and loss.
        teacher: Base model for distillation.
        state: What `on_epoch` was given after an earlier epoch, to continue from there.
        on_epoch: Called after each epoch with its result and the state to continue from.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    if teacher is not None:
        teacher.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for epoch in range(first, recipe.epochs):
        loss = train_epoch(model, optimizer, *train_split, recipe, epoch, teacher=teacher)
        accuracy = measure(model, *search_split, dtype=fast_dtype())
        if on_epoch is not None:
            on_epoch(
                EpochResult(epoch, loss, accuracy),
                {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch},
            )
