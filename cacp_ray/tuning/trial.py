"""One fine-tuning trial: what runs in a process of its own, for one subnet.

Each epoch is reported with a checkpoint that holds all that is needed: the training state, to go on
from, and the best weights so far, to keep. So the last checkpoint alone survives a killed trial.
"""

import dataclasses
import logging
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.files import write_json, write_tensors
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.training.loop import EpochResult, train
from cacp_ray.training.metrics import fast_dtype, measure
from cacp_ray.training.recipe import Recipe

STATE_FILE = "state.pt"


@dataclass(frozen=True)
class TrialTask:
    """What all trials of an experiment share, beside the images.

    Attributes:
        subnet_folders: Absolute, by rate.
        load_subnet: Builds the subnet of a folder as the search left it.
        load_teacher: Builds the base model; called only where the recipe distils.
        recipe: Schedule and loss.
        num_threads: Of torch, the CPUs the trial asked for.
    """

    subnet_folders: Mapping[float, Path]
    load_subnet: Callable[[Path], nn.Module]
    load_teacher: Callable[[], nn.Module]
    recipe: Recipe
    num_threads: int


@dataclass(frozen=True)
class FinetuneResult:
    """One fine-tuned subnet, as in its metrics.json; accuracies are shares in [0, 1].

    Attributes:
        rate: Share of the original cost kept.
        epochs: Trained.
        best_epoch: The one whose weights are kept, from 1; 0 for the subnet as it was.
        search_top1_before: On the search split, before training.
        search_top1: On the search split, of the kept weights: what they were chosen by.
        search_images: Of the search split.
        test_top1: On the test split, of the kept weights, in float32.
        test_top5: On the test split.
        test_loss: Mean cross-entropy on the test split in nats.
        test_images: Of the test split.
        seconds: Training and measuring, lost work of killed trials not counted.
    """

    rate: float
    epochs: int
    best_epoch: int
    search_top1_before: float
    search_top1: float
    search_images: int
    test_top1: float
    test_top5: float
    test_loss: float
    test_images: int
    seconds: float


def finetune_trial(
    config: dict[str, Any],
    *,
    task: TrialTask,
    train_split: ImageSet,
    search_split: ImageSet,
    test_split: ImageSet,
) -> None:
    """Trains the subnet of `config["rate"]`, or goes on from the trial's checkpoint.

    The weights of the best epoch by search-split accuracy (the earliest of equals) are written to
    finetuned.safetensors beside the subnet, then their figures to metrics.json. The test split is
    measured after that choice, and nowhere else.
    """
    torch.set_num_threads(task.num_threads)
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for every checkpoint
    started = time.monotonic()
    rate = config["rate"]
    folder = task.subnet_folders[rate]
    recipe = task.recipe
    search = search_split.tensors()
    model = task.load_subnet(folder)
    teacher = task.load_teacher() if recipe.distillation > 0 else None
    state = read_checkpoint()
    if state is None:
        before = measure(model, *search, dtype=fast_dtype()).top1
        best = {"model": copy_weights(model), "epoch": 0, "top1": before}
        seconds = 0.0
    else:
        before, best, seconds = state["before"], state["best"], state["seconds"]

    def finish_epoch(result: EpochResult, training: dict[str, Any]) -> None:
        nonlocal best, seconds, started
        epoch = result.epoch + 1
        if result.search.top1 > best["top1"]:
            best = {"model": copy_weights(model), "epoch": epoch, "top1": result.search.top1}
        now = time.monotonic()
        elapsed, started = now - started, now
        seconds += elapsed
        metrics = {
            "epoch": epoch,
            "train_loss": result.train_loss,
            "search_top1": result.search.top1,
            "epoch_seconds": elapsed,
        }
        saved = training | {"before": before, "best": best, "seconds": seconds}
        with tempfile.TemporaryDirectory() as directory:
            torch.save(saved, Path(directory) / STATE_FILE)
            tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(directory))

    train(
        model,
        train_split.tensors(),
        search,
        recipe,
        teacher=teacher,
        state=state,
        on_epoch=finish_epoch,
    )
    model.load_state_dict(best["model"])
    test = measure(model, *test_split.tensors())
    result = FinetuneResult(
        rate=rate,
        epochs=recipe.epochs,
        best_epoch=best["epoch"],
        search_top1_before=before,
        search_top1=best["top1"],
        search_images=len(search[1]),
        test_top1=test.top1,
        test_top5=test.top5,
        test_loss=test.loss,
        test_images=test.images,
        seconds=seconds + time.monotonic() - started,
    )
    write_tensors(folder / "finetuned.safetensors", all_tensors(model))
    recipe_row = {"recipe": dataclasses.asdict(recipe)}
    write_json(folder / "metrics.json", dataclasses.asdict(result) | recipe_row)


def read_checkpoint() -> dict[str, Any] | None:
    """The state of the last reported epoch; None at the start of a trial."""
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        return None
    with checkpoint.as_directory() as directory:
        return torch.load(Path(directory) / STATE_FILE, weights_only=True)


def copy_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as it is now."""
    return {key: value.detach().clone() for key, value in model.state_dict().items()}
