"""The training in which widths are learned, resumed exactly from any epoch."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.searching.widths.method import Method, TrainingBatch, Widths
from cacp_ray.training.curvature import find_rate
from cacp_ray.training.loop import EpochResult, make_batches, make_optimizer, train_epoch
from cacp_ray.training.metrics import fast_dtype, find_device, measure_split
from cacp_ray.training.recipe import Recipe


def learn_widths(
    model: nn.Module,
    make: Callable[[], Method],
    train_split: ImageSet | ImageStream,
    search_split: ImageSet,
    recipe: Recipe,
    *,
    teacher: nn.Module | None = None,
    state: dict[str, Any] | None = None,
    on_epoch: Callable[[EpochResult, dict[str, Any]], None],
) -> None:
    """Trains the network in place, through the recipe's epochs or from `state` to their end.

    Args:
        model: The whole network; it gets the method's gates, and ends with its trained weights.
        make: Makes the method, which attaches its gates.
        train_split: Images to learn from.
        search_split: Images that are measured after each epoch, for the log alone.
        recipe: The recipe of the fine-tuning with the epochs of this training; its weight average
            is not used, as averages of networks with different channels would be.
        teacher: Network whose soft labels are learned.
        state: What `on_epoch` was given.
        on_epoch: Called after each epoch with the result and what to go on from; after the last one
            it has the `widths` of every rate.
    """
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if teacher is not None:
        teacher.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if state is not None:
        model.load_state_dict(state["model"])
        recipe = replace(recipe, lr=state["lr"])
    elif recipe.lr == "auto":  # of the whole network, before any gate closes
        recipe = replace(recipe, lr=find_rate(model, train_split, recipe, teacher))
    optimizer = make_optimizer(model, recipe)
    method = make()
    if state is not None:
        optimizer.load_state_dict(state["optimizer"])
        method.load_state_dict(state["method"])
    batches = make_batches(train_split, recipe)
    first = 0 if state is None else state["epoch"] + 1
    for epoch in range(first, recipe.epochs):
        loss = train_epoch(
            model,
            optimizer,
            batches,
            recipe,
            epoch,
            teacher=teacher,
            loss_of=lambda *values, **others: method.loss(TrainingBatch(*values, **others)),
            after_step=method.after_step,
        )
        accuracy = measure_split(model, search_split, dtype=fast_dtype(find_device(model).type))
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "method": method.state_dict(),
            "epoch": epoch,
            "lr": recipe.peak,
        }
        if epoch == recipe.epochs - 1:
            state["widths"] = [as_state(widths) for widths in method.finish()]
        on_epoch(EpochResult(epoch, loss, accuracy), state)


def as_state(widths: Widths) -> dict[str, Any]:
    """What a checkpoint holds of the widths of a rate."""
    return {
        "rate": widths.rate,
        "keep_counts": torch.as_tensor(widths.keep_counts),
        "orders": [torch.as_tensor(order) for order in widths.orders],
    }
