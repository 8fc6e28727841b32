"""Trainings that learn widths, as trials of Ray Tune: one for each rate, or one for all.

Each epoch is a checkpoint to go on from; that of the last epoch holds the widths.
"""

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.io.labels import Selector
from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.progress import FinetuneProgress
from cacp_ray.searching.widths.learning import learn_widths
from cacp_ray.searching.widths.method import WidthProblem, Widths
from cacp_ray.searching.widths.table import FOR_ALL_RATES, make_method
from cacp_ray.training.loop import EpochResult
from cacp_ray.training.recipe import Recipe
from cacp_ray.tuning.experiment import (
    ReportCallback,
    TrialFiles,
    as_resources,
    check_trials,
    make_run_config,
    running_tune,
)
from cacp_ray.tuning.finetune import restore_tuner
from cacp_ray.tuning.train import STATE_FILE, read_state


@dataclass(frozen=True)
class WidthTask:
    """What all trials of an experiment share, except the images.

    Attributes:
        strategy: Name of the method.
        model: The base network, which is trained and which teaches.
        problem: The problem with all rates of the run.
        recipe: Recipe of the training.
        cpus: CPUs of a trial, and its threads.
        gpus: Share of a GPU for a trial.
        labels: Labels of the nodes that trials run on.
    """

    strategy: str
    model: nn.Module
    problem: WidthProblem
    recipe: Recipe
    cpus: int
    gpus: float
    labels: Selector = field(default_factory=dict)


@dataclass(frozen=True)
class Learned:
    """A network that was trained while its widths were learned.

    Attributes:
        widths: Widths of one rate.
        tensors: State of the whole network; trials that serve several rates share it.
        seconds: Time of the training, without the lost work of killed trials.
    """

    widths: Widths
    tensors: dict[str, Tensor]
    seconds: float


def run_width_trials(
    task: WidthTask,
    splits: tuple[ImageSet | ImageStream, ImageSet],
    files: TrialFiles,
    on_epoch: Callable[[FinetuneProgress], object],
) -> list[Learned]:
    """Learns the widths of all rates; begun trials go on. One entry a rate.

    Raises:
        ArtifactError: The experiment in `files` is damaged.
        EvaluationError: A trial died more often than it is restarted.
    """
    trials = group_rates(task.strategy, task.problem.rates)
    trainable = tune.with_resources(
        tune.with_parameters(_learn, task=task, splits=[ray.put(split) for split in splits]),
        as_resources(task.cpus, task.gpus, task.labels),
    )
    space = {"trial": tune.grid_search([*range(len(trials))])}

    def note(trial: Any, metrics: dict[str, Any]) -> None:
        on_epoch(
            FinetuneProgress(
                rate=trials[trial.config["trial"]][-1],
                variant="",
                epoch=metrics["epoch"],
                epochs=task.recipe.epochs,
                train_loss=metrics["train_loss"],
                search_score=metrics["search_score"],
                seconds=metrics["epoch_seconds"],
            )
        )

    with running_tune(note, files):
        tuner = restore_tuner(trainable, space, files) or tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                trial_dirname_creator=lambda trial: name_trial(trials[trial.config["trial"]])
            ),
            run_config=make_run_config(files, [ReportCallback()], 2),
        )
        results: Any = tuner.fit()
    check_trials(results, f"{task.strategy} of")
    learned: list[Learned] = []
    for result in results:
        state = read_state(result.checkpoint)
        for row in state["widths"]:
            orders = [order.numpy() for order in row["orders"]]
            widths = Widths(row["rate"], row["keep_counts"].numpy(), orders)
            learned.append(Learned(widths, state["model"], state["seconds"]))
    return sorted(learned, key=lambda each: each.widths.rate)


def group_rates(strategy: str, rates: Sequence[float]) -> list[tuple[float, ...]]:
    """The rates of each trial, the largest first because it takes longest."""
    if strategy in FOR_ALL_RATES:
        return [tuple(sorted(rates))]
    return [(rate,) for rate in sorted(rates, reverse=True)]


def name_trial(rates: Sequence[float]) -> str:
    """Name of a trial's folder."""
    return "-".join(["rate", *map(format_rate, rates)])


def _learn(config: dict[str, Any], *, task: WidthTask, splits: list[Any]) -> None:
    """A trial: trains to the end, from its checkpoint where there is one."""
    torch.set_num_threads(task.cpus)
    started = time.monotonic()
    train_split, search_split = ray.get(splits)
    device = torch.device("cuda" if task.gpus else "cpu")
    rates = group_rates(task.strategy, task.problem.rates)[config["trial"]]
    problem = replace(task.problem, rates=rates)
    checkpoint = tune.get_checkpoint()
    state = None if checkpoint is None else read_state(checkpoint)
    seconds = 0.0 if state is None else state["seconds"]
    model = copy.deepcopy(task.model).to(device)
    teacher = copy.deepcopy(task.model).to(device) if task.recipe.distillation > 0 else None

    def report(result: EpochResult, training: dict[str, Any]) -> None:
        nonlocal seconds, started
        now = time.monotonic()
        elapsed, started = now - started, now
        seconds += elapsed
        with tempfile.TemporaryDirectory() as folder:
            torch.save(training | {"seconds": seconds}, Path(folder) / STATE_FILE)
            tune.report(
                {
                    "epoch": result.epoch + 1,
                    "train_loss": result.train_loss,
                    "search_score": result.search.top1,
                    "epoch_seconds": elapsed,
                },
                checkpoint=tune.Checkpoint.from_directory(folder),
            )

    learn_widths(
        model,
        lambda: make_method(task.strategy, problem, model),
        train_split,
        search_split,
        task.recipe,
        teacher=teacher,
        state=state,
        on_epoch=report,
    )
