"""One epoch loop for base training and fine-tuning, with distillation and exact resumption.

An epoch's image order, augmentation and dropout depend on (seed, epoch, worker) alone, so a resumed
run does exactly what the uninterrupted run would have done.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_leaves

from cacp_ray.data.batches import Augmentation, ImageBatches
from cacp_ray.data.streams import ImageStream, StreamBatches
from cacp_ray.errors import EvaluationError
from cacp_ray.training.metrics import Accuracy, Split, fast_dtype, find_device, measure_split
from cacp_ray.training.optimizer import SGD
from cacp_ray.training.recipe import Recipe

MAIN = ("out", "logits")  # names of the main head's scores in a dictionary
AUXILIARY = 0.3  # weight of the loss of an auxiliary head (Szegedy et al., 2015, section 5)
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
        return recipe.lr * (step + 1) / warm
    done = (step - warm) / max(1, num_steps - warm)
    return recipe.lr * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizer(model: nn.Module, recipe: Recipe) -> Any:
    """The recipe's optimizer; biases and BN parameters are not decayed."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    return SGD(groups, lr=recipe.lr, momentum=recipe.momentum)


def train_epoch(
    model: nn.Module,
    optimizer: Any,
    batches: Batches,
    recipe: Recipe,
    epoch: int,
    *,
    teacher: nn.Module | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> float:
    """Trains epoch `epoch`, from 0, of the recipe's schedule in place; returns its mean loss.

    The optimizer's learning rate is set before every step. Without a teacher there is no
    distillation.
    """
    epoch_seed = recipe.seed * 100_003 + epoch
    torch.manual_seed(epoch_seed + batches.shard[0] * 1_000_003)  # dropout differs by worker
    rng = np.random.default_rng(epoch_seed)
    device = find_device(model)
    dtype = fast_dtype(device.type)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    cross_entropy = partial(functional.cross_entropy, label_smoothing=recipe.label_smoothing)
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
        with autocast:
            if other is not None:
                x = share * x + (1 - share) * x[other]
            logits, *auxiliary = read_scores(model(x), partial(count_classes, model, x[:1]))
        loss = torch.zeros((), device=device)
        for weight, scores in [(1.0, logits), *((AUXILIARY, scores) for scores in auxiliary)]:
            loss = loss + weight * share * cross_entropy(scores, y)
            if other is not None:
                loss = loss + weight * (1 - share) * cross_entropy(scores, y[other])
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
        after_step()
        total += loss.item() * len(y)
        num_images += len(y)
    return total / num_images


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
            on_epoch(EpochResult(epoch, loss, accuracy), state | {"epoch": epoch})
    if average is not None:
        model.load_state_dict(measured.state_dict())


def measured_weights(state: dict[str, Any]) -> dict[str, Tensor]:
    """A copy of the weights in a state whose accuracy was measured: the averaged ones, if any."""
    prefix = "module." if "average" in state else ""
    weights = state["average" if prefix else "model"]
    return {
        key.removeprefix(prefix): value.detach().clone()
        for key, value in weights.items()
        if key.startswith(prefix)
    }
