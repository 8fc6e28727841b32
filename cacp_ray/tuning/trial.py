"""One fine-tuning trial: a subnet and a recipe, in a process of its own or in several workers.

Each epoch is reported with a checkpoint that holds the training state, to go on from, and the best
weights so far, to keep. So the last checkpoint is enough to survive a killed trial.
"""

import dataclasses
import logging
import time
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray import tune

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.training.metrics import measure_split
from cacp_ray.tuning.train import Checkpoint, TrialTask, read_state, train_subnet

PATH_KEY = "checkpoint_path"  # metric of a report whose checkpoint several workers wrote


@dataclass(frozen=True)
class Trained:
    """A fine-tuned network, ready to be written into the folder of its subnet."""

    result: "FinetuneResult"
    tensors: dict[str, torch.Tensor]
    metrics: dict[str, Any]  # content of metrics.json


@dataclass(frozen=True)
class FinetuneResult:
    """One fine-tuned subnet, as in its metrics.json; accuracies are shares in [0, 1]."""

    rate: float  # share of the original cost kept
    variant: str  # the best on the search split; empty where there was only one recipe
    epochs: int  # epochs trained
    best_epoch: int  # epoch whose weights are kept, from 1; 0 for the subnet as it was
    search_score_before: float  # before training
    search_score: float  # with the kept weights, which were chosen by it
    search_images: int
    test_score: float  # with the kept weights, in float32
    test_top5: float
    test_loss: float  # mean cross-entropy in nats
    test_images: int
    seconds: float  # training and measuring, without the lost work of killed trials


def finetune_trial(config: dict[str, Any], *, task: TrialTask, splits: list[Any]) -> None:
    """Trains a subnet to the end, from the trial's checkpoint where it has one.

    The splits are references of the images to learn from and of the search split.
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


def keep_best(
    config: dict[str, Any],
    checkpoint: Checkpoint,
    variants: dict[str, Any],
    task: TrialTask,
    search_images: int,
    test_split: ImageSet | ImageStream,
) -> Trained:
    """The weights that the best trial of a rate keeps, and what they reach.

    The test split is measured here, after all choices, and nowhere else. The checkpoint is the last
    of the best trial; metrics.json takes `variants` as they are.
    """
    torch.set_num_threads(task.resources.cpus)
    started = time.monotonic()
    state = read_state(checkpoint)
    model = task.load_subnets[config["rate"]]()
    model.load_state_dict(state["best"]["model"])
    test = measure_split(model.to("cuda" if task.resources.gpus else "cpu"), test_split)
    model.cpu()
    result = FinetuneResult(
        rate=config["rate"],
        variant=config["variant"],
        epochs=state["epoch"] + 1,
        best_epoch=state["best"]["epoch"],
        search_score_before=state["before"],
        search_score=state["best"]["score"],
        search_images=search_images,
        test_score=test.top1,
        test_top5=test.top5,
        test_loss=test.loss,
        test_images=test.images,
        seconds=state["seconds"] + time.monotonic() - started,
    )
    more = {
        "recipe": dataclasses.asdict(task.recipes[config["variant"]]),
        "lr": state.get("lr"),
        "variants": variants,
        "history": state.get("history", []),
    }
    return Trained(result, all_tensors(model), dataclasses.asdict(result) | more)
