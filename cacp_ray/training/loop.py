"""One epoch loop for base training and fine-tuning, with distillation and exact resumption.

An epoch's image order, augmentation and dropout depend on (seed, epoch, worker) alone, so a resumed
run does exactly what the uninterrupted run would have done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from cacp_ray.data.batches import Augmentation, ImageBatches
from cacp_ray.data.streams import ImageStream, StreamBatches
from cacp_ray.training.curvature import find_rate
from cacp_ray.training.metrics import Accuracy, Split, fast_dtype, find_device, measure_split
from cacp_ray.training.objective import fast_autocast, objective, soft_labels
from cacp_ray.training.optimizer import SGD
from cacp_ray.training.recipe import Recipe

Batches = ImageBatches | StreamBatches


@dataclass(frozen=True)
class EpochResult:
    """One finished epoch, with its mean loss and the accuracy on the search split."""

    epoch: int
    train_loss: float
    search: Accuracy


def make_batches(images: Split, recipe: Recipe, shard: tuple[int, int] = (0, 1)) -> Batches:
    """Batches of images in memory or of a stream, augmented as a recipe says."""
    augmentation = Augmentation(recipe.batch_size, recipe.padding, recipe.erasing, recipe.seed)
    if isinstance(images, ImageStream):
        return StreamBatches(images, augmentation, shard)
    return ImageBatches(images, augmentation, shard)


def learning_rate(recipe: Recipe, step: int, num_steps: int) -> float:
    """Learning rate of step `step` of `num_steps`: a linear warm-up, then a cosine to zero."""
    warm = max(1, round(recipe.warmup * num_steps))
    if step < warm:
        return recipe.peak * (step + 1) / warm
    done = (step - warm) / max(1, num_steps - warm)
    return recipe.peak * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, recipe: Recipe) -> Any:
    """The recipe's optimizer; biases and BN parameters are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.peak)
    return SGD(groups, lr=recipe.peak, momentum=recipe.momentum)


def train_epoch(
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    recipe: Recipe,
    epoch: int,
    *,
    teacher: nn.Module | None = None,
    loss_of: Callable[..., Tensor] = objective,
    after_step: Callable[[], object] = lambda: None,
) -> float:
    """Trains epoch `epoch`, from 0, of the recipe's schedule in place; returns its mean loss.

    The optimizer's learning rate is set before every step. Without a teacher there is no
    distillation. `loss_of` takes what `objective` takes.
    """
    epoch_seed = recipe.seed * 100_003 + epoch
    torch.manual_seed(epoch_seed + batches.shard[0] * 1_000_003)  # dropout differs by worker
    rng = np.random.default_rng(epoch_seed)
    device = find_device(model)
    autocast = fast_autocast(device.type)
    total, num_images = 0.0, 0
    model.train()
    for number, (images, labels) in enumerate(batches.epoch(epoch)):
        step, steps = epoch * batches.num_batches + number, recipe.epochs * batches.num_batches
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step, steps)
        x, y = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        share, other = 1.0, None
        if recipe.mixup > 0:
            share, other = rng.beta(recipe.mixup, recipe.mixup), rng.permutation(len(y))
        if other is not None:
            with autocast:
                x = share * x + (1 - share) * x[other]
        target = soft_labels(teacher, x, recipe)
        loss = loss_of(model, x, y, recipe, target, share=share, other=other)
        optimizer.zero_grad()
        loss.backward()
        if recipe.clip_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
        optimizer.step()
        after_step()
        total += loss.item() * len(y)
        num_images += len(y)
    return total / num_images


def train(
    model: nn.Module,
    batches: Batches,
    search_split: Split,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochResult, dict[str, Any]], None] | None = None,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """Trains `model` in place through the whole schedule, or from `state` to its end.

    The network is moved to channels_last, and ends with the averaged weights where the recipe
    averages. `on_epoch` is called after each epoch with its result on the search split and the
    state to continue from, whose `measured_weights` were measured. `wrap` wraps the network for
    training, for example in DistributedDataParallel.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if state is not None:
        recipe = replace(recipe, lr=state.get("lr", recipe.lr))
    elif recipe.lr == "auto":
        images = batches.images if isinstance(batches, ImageBatches) else batches.stream
        recipe = replace(recipe, lr=_agree(find_rate(model, images, recipe, teacher)))
    optimizer = make_optimizer(model, recipe)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"] + 1
    average: Any = None
    if recipe.ema > 0:
        from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

        update = get_ema_multi_avg_fn(recipe.ema)
        average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    if average is not None and state is not None:
        average.load_state_dict(state["average"])
    measured = model if average is None else average.module
    trained = wrap(model)
    for epoch in range(first, recipe.epochs):
        loss = train_epoch(
            trained,
            optimizer,
            batches,
            recipe,
            epoch,
            teacher=teacher,
            after_step=lambda: None if average is None else average.update_parameters(model),
        )
        accuracy = measure_split(measured, search_split, dtype=fast_dtype(find_device(model).type))
        if on_epoch is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            if average is not None:
                state["average"] = average.state_dict()
            state |= {"epoch": epoch, "lr": recipe.peak}
            on_epoch(EpochResult(epoch, loss, accuracy), state)
    if average is not None:
        model.load_state_dict(measured.state_dict())


def _agree(rate: float) -> float:
    """The rate of the first of several workers, whose processors may round otherwise."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rate
    rates = [rate]
    distributed.broadcast_object_list(rates)
    return rates[0]


def measured_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """A copy of the weights in a state whose accuracy was measured: the averaged ones, if any."""
    prefix = "module." if "average" in state else ""
    weights = state["average" if prefix else "model"]
    return {
        key.removeprefix(prefix): value.detach().clone()
        for key, value in weights.items()
        if key.startswith(prefix)
    }
