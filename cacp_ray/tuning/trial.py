"""One fine-tuning trial: a subnet and a recipe, in a process of its own or in several workers.

Each epoch is reported with a checkpoint that holds all that is needed: the training state, to go on
from, and the best weights so far, to keep. So the last checkpoint alone survives a killed trial.
"""

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.files import write_json, write_tensors
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.training.loop import EpochResult, make_batches, measured_weights, train
from cacp_ray.training.metrics import fast_dtype, measure_split
from cacp_ray.training.recipe import Recipe

STATE_FILE = "state.pt"
PATH_KEY = "checkpoint_path"  # of a report's metrics, where several workers wrote the checkpoint

Report = Callable[[dict[str, Any], str], object]  # metrics, folder of the checkpoint


@dataclass(frozen=True)
class Resources:
    """Of one trial, or of each of its workers.

    Attributes:
        cpus: Reserved; torch uses as many threads.
        gpus: Reserved; a share lets several trials use one.
        workers: Processes that train one model; more than one by DistributedDataParallel. A pair:
            at least and at most so many, as nodes come and go.
    """

    cpus: int = 1
    gpus: float = 0.0
    workers: int | tuple[int, int] = 1

    @property
    def most_workers(self) -> int:
        """Processes of a trial, beside its own where there are several."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


@dataclass(frozen=True)
class TrialTask:
    """What all trials of an experiment share, beside the images.

    Attributes:
        subnet_folders: Absolute, by rate.
        load_subnet: Builds the subnet of a folder as the search left it.
        load_teacher: Builds the teacher; called only where the recipe distils.
        recipes: Schedule and loss, by the name of the variant.
        resources: Of a trial.
    """

    subnet_folders: Mapping[float, Path]
    load_subnet: Callable[[Path], nn.Module]
    load_teacher: Callable[[], nn.Module]
    recipes: Mapping[str, Recipe]
    resources: Resources


@dataclass(frozen=True)
class FinetuneResult:
    """One fine-tuned subnet, as in its metrics.json; accuracies are shares in [0, 1].

    Attributes:
        rate: Share of the original cost kept.
        variant: Of the recipe, that was best on the search split; empty where there was one.
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
    variant: str
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
    splits: list[Any],
) -> None:
    """Trains the subnet of `config["rate"]` by the recipe of `config["variant"]`, to its end.

    Goes on from the trial's checkpoint where it has one.

    Args:
        config: Of the trial.
        task: Of the experiment.
        splits: References of the images to learn from and of the search split.
    """
    logging.getLogger("ray.train").setLevel(logging.WARNING)  # a line for every checkpoint
    if task.resources.most_workers > 1:
        from cacp_ray.tuning.workers import train_in_workers

        train_in_workers(config, task, splits)
        return

    def report(metrics: dict[str, Any], folder: str) -> None:
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))

    train_split, search_split = ray.get(splits)
    train_subnet(config, task, train_split, search_split, tune.get_checkpoint(), report)


def train_subnet(
    config: dict[str, Any],
    task: TrialTask,
    train_split: ImageSet | ImageStream,
    search_split: ImageSet,
    checkpoint: Any,
    report: Report,
    *,
    shard: tuple[int, int] = (0, 1),
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> None:
    """What a trial does, or one of its workers.

    The best weights are those of the best epoch by search-split accuracy, the earliest of equals,
    or the subnet's own.

    Args:
        config: Rate and variant.
        task: Of the experiment.
        train_split: Images to learn from.
        search_split: Measured after each epoch.
        checkpoint: To go on from; None at the start.
        report: Called after each epoch.
        shard: Number of this worker and of all.
        wrap: As of `cacp_ray.training.loop.train`.
    """
    torch.set_num_threads(task.resources.cpus)
    started = time.monotonic()
    recipe = task.recipes[config["variant"]]
    device = torch.device("cuda" if task.resources.gpus else "cpu")
    model = task.load_subnet(task.subnet_folders[config["rate"]]).to(device)
    teacher = task.load_teacher().to(device) if recipe.distillation > 0 else None
    state = None if checkpoint is None else read_state(checkpoint)
    if state is None:
        before = measure_split(model, search_split, dtype=fast_dtype(device.type)).top1
        weights = measured_weights({"model": model.state_dict()})
        best = {"model": weights, "epoch": 0, "top1": before}
        seconds = 0.0
        history = []
    else:
        before, best, seconds = state["before"], state["best"], state["seconds"]
        history = state.get("history", [])

    def finish_epoch(result: EpochResult, training: dict[str, Any]) -> None:
        nonlocal best, seconds, started
        epoch = result.epoch + 1
        if result.search.top1 > best["top1"]:
            weights = measured_weights(training)
            best = {"model": weights, "epoch": epoch, "top1": result.search.top1}
        now = time.monotonic()
        elapsed, started = now - started, now
        seconds += elapsed
        metrics = {
            "epoch": epoch,
            "train_loss": result.train_loss,
            "search_top1": result.search.top1,
            "best_top1": best["top1"],
            "epoch_seconds": elapsed,
            "workers": shard[1],
        }
        # Of a training that diverges; a file of JSON has no such number.
        loss = result.train_loss if math.isfinite(result.train_loss) else None
        history.append(metrics | {"train_loss": loss})
        about = {"before": before, "best": best, "seconds": seconds, "history": history}
        saved = training | about
        with tempfile.TemporaryDirectory() as directory:
            torch.save(saved, Path(directory) / STATE_FILE)
            report(metrics, directory)

    train(
        model,
        make_batches(train_split, recipe, shard),
        search_split,
        recipe,
        teacher=teacher,
        state=state,
        on_epoch=finish_epoch,
        wrap=wrap,
    )


def read_state(checkpoint: Any) -> dict[str, Any]:
    """What a trial saved after an epoch."""
    with checkpoint.as_directory() as directory:
        file = Path(directory) / STATE_FILE
        return torch.load(file, weights_only=True, map_location="cpu")


def keep_best(
    config: dict[str, Any],
    checkpoint: Any,
    variants: dict[str, Any],
    *,
    task: TrialTask,
    search_images: int,
    test_split: ImageSet | ImageStream,
) -> FinetuneResult:
    """Writes finetuned.safetensors beside the subnet of a finished trial, then metrics.json.

    The test split is measured here, after all choices, and nowhere else.
    """
    torch.set_num_threads(task.resources.cpus)
    started = time.monotonic()
    folder = task.subnet_folders[config["rate"]]
    recipe = task.recipes[config["variant"]]
    state = read_state(checkpoint)
    model = task.load_subnet(folder)
    model.load_state_dict(state["best"]["model"])
    test = measure_split(model.to("cuda" if task.resources.gpus else "cpu"), test_split)
    model.cpu()
    result = FinetuneResult(
        rate=config["rate"],
        variant=config["variant"],
        epochs=state["epoch"] + 1,
        best_epoch=state["best"]["epoch"],
        search_top1_before=state["before"],
        search_top1=state["best"]["top1"],
        search_images=search_images,
        test_top1=test.top1,
        test_top5=test.top5,
        test_loss=test.loss,
        test_images=test.images,
        seconds=state["seconds"] + time.monotonic() - started,
    )
    write_tensors(folder / "finetuned.safetensors", all_tensors(model))
    more = {
        "recipe": dataclasses.asdict(recipe),
        "variants": variants,
        "history": state.get("history", []),
    }
    write_json(folder / "metrics.json", dataclasses.asdict(result) | more)
    return result
