"""Trains one subnet: the work of a fine-tuning trial, or of each of its workers."""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from pyarrow import fs
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.io.labels import Selector
from cacp_ray.training.loop import EpochResult, make_batches, measured_weights, train
from cacp_ray.training.metrics import fast_dtype, measure_split
from cacp_ray.training.recipe import Recipe

STATE_FILE = "state.pt"
Report = Callable[[dict[str, Any], str], object]  # metrics, folder of the checkpoint


class Checkpoint(Protocol):
    """A checkpoint of Tune or Train."""

    def as_directory(self) -> AbstractContextManager[str]:
        """The folder of its files, on this machine."""
        ...


@dataclass(frozen=True)
class Resources:
    """What one trial reserves, or each of its workers.

    Several workers train one model by DistributedDataParallel. A pair gives the fewest and the
    most, as nodes come and go.
    """

    cpus: int = 1  # also threads of torch
    gpus: float = 0.0  # a share lets several trials use one
    workers: int | tuple[int, int] = 1
    labels: Selector = field(default_factory=dict)  # of the nodes that they run on

    @property
    def most_workers(self) -> int:
        """The most workers of a trial; more than one run next to the trial's own process."""
        return self.workers if isinstance(self.workers, int) else self.workers[1]


def name_trial(config: Mapping[str, Any]) -> str:
    """Name of a trial's folder."""
    variant = config["variant"]
    return f"rate-{config['rate']:g}" + (f"-{variant}" if variant else "")


@dataclass(frozen=True)
class TrialTask:
    """What all trials of an experiment share, except the images.

    Trials read no files of the run: the networks come with the task, and results go back.
    `load_subnets` build the subnets as the search left them, never with weights of an earlier
    fine-tuning.
    """

    load_subnets: Mapping[float, Callable[[], nn.Module]]  # by rate
    load_teacher: Callable[[], nn.Module]  # called only where the recipe distils
    recipes: Mapping[str, Recipe]  # by the name of the variant
    resources: Resources
    trials: str = ""  # folder of the trials, BUCKET/FOLDER in an object store
    filesystem: fs.FileSystem | None = None  # of that folder; None: a disk that all nodes share


def train_subnet(
    config: dict[str, Any],  # rate and variant
    task: TrialTask,
    train_split: ImageSet | ImageStream,
    search_split: ImageSet,  # measured after each epoch, then `report` is called
    checkpoint: Checkpoint | None,  # to go on from
    report: Report,
    *,
    shard: tuple[int, int] = (0, 1),  # index of this worker and number of all
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,  # see `training.loop.train`
) -> None:
    """Trains the subnet of a rate by the recipe of a variant, to the end of its schedule.

    The best weights are those of the epoch with the best search-split accuracy, the earliest of
    equals, or the subnet's own.
    """
    torch.set_num_threads(task.resources.cpus)
    started = time.monotonic()
    recipe = task.recipes[config["variant"]]
    device = torch.device("cuda" if task.resources.gpus else "cpu")
    model = task.load_subnets[config["rate"]]().to(device)
    teacher = task.load_teacher().to(device) if recipe.distillation > 0 else None
    state = None if checkpoint is None else read_state(checkpoint)
    if state is None:
        before = measure_split(model, search_split, dtype=fast_dtype(device.type)).top1
        weights = measured_weights({"model": model.state_dict()})
        best = {"model": weights, "epoch": 0, "score": before}
        seconds = 0.0
        history = []
    else:
        before, best, seconds = state["before"], state["best"], state["seconds"]
        history = state.get("history", [])

    def finish_epoch(result: EpochResult, training: dict[str, Any]) -> None:
        nonlocal best, seconds, started
        epoch = result.epoch + 1
        if result.search.top1 > best["score"]:
            weights = measured_weights(training)
            best = {"model": weights, "epoch": epoch, "score": result.search.top1}
        now = time.monotonic()
        elapsed, started = now - started, now
        seconds += elapsed
        metrics = {
            "epoch": epoch,
            "train_loss": result.train_loss,
            "search_score": result.search.top1,
            "best_score": best["score"],
            "epoch_seconds": elapsed,
            "workers": shard[1],
        }
        # JSON has no number for the loss of a training that diverges.
        loss = result.train_loss if math.isfinite(result.train_loss) else None
        history.append(metrics | {"train_loss": loss})
        progress = {"before": before, "best": best, "seconds": seconds, "history": history}
        with tempfile.TemporaryDirectory() as directory:
            torch.save(training | progress, Path(directory) / STATE_FILE)
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


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Reads what a trial saved after an epoch."""
    with checkpoint.as_directory() as directory:
        file = Path(directory) / STATE_FILE
        return torch.load(file, weights_only=True, map_location="cpu")
