"""What a search is about: images of classes, or a network and a task of the user's own."""

# pyright: basic
# Basic: tasks and networks are the user's own.

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError, users_code
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.preparation import hash_weights, needed_kinds
from cacp_ray.evaluation.task import FunctionTask, OwnTask
from cacp_ray.models.factory import GIVEN, package_of
from cacp_ray.pruning.calibration import (
    Batch,
    Calibration,
    Loss,
    classify,
    mean_loss,
    read_examples,
    run_batch,
)
from cacp_ray.pruning.inputs import Inputs, call, check_inputs, check_network, describe_shapes
from cacp_ray.workflows.network import check_output, load_model
from cacp_ray.workflows.splits import Splits, check_padding, check_splits

Problem: TypeAlias = tuple[nn.Module, Calibration, Classification | OwnTask, Inputs]
OBJECT = "python:task"  # name of a task that was given as an object


@dataclass(frozen=True)
class Given:
    """What a Python caller gave as objects.

    Attributes:
        model: The whole network; None builds the one that the configuration names.
        task: The task; None makes the one that the configuration names.
    """

    model: nn.Module | None = None
    task: Any = None

    @property
    def parts(self) -> dict[str, Any]:
        """What is sent to evaluators, by the names that a caller knows."""
        parts: dict[str, Any] = {"task": self.task}
        if isinstance(self.task, FunctionTask):
            parts = {
                "calibration": self.task.make_loader,
                "score": self.task.score_network,
                "loss": self.task.loss_of,
                "example_inputs": self.task.example_inputs,
            }
        named = {"model": self.model, **parts}
        return {name: part for name, part in named.items() if part is not None}


def find_task(config: RunConfig, given: Given | None) -> OwnTask | None:
    """The task of a run; None for the built-in one.

    Raises:
        ConfigError: It cannot be made, or was given as an object and is not given now.
    """
    if given is not None and given.task is not None:
        return OwnTask.make(config.task or OBJECT, given.task)
    if config.task is None:
        return None
    if config.task == OBJECT:
        raise ConfigError(
            f"task {OBJECT} stands for objects that were given in Python: give a run the same "
            "model, calibration and score again, in cacp_ray.search(..., resume=True); in a new "
            "configuration, write package.module:Class"
        )
    return OwnTask.make(config.task)


def read_images(config: RunConfig) -> Problem:
    """The built-in task: images, their classes, and the network of the configuration.

    Raises:
        CacpError: The first thing that does not fit.
    """
    if config.model.weights is None:
        raise ConfigError("model.weights is missing: a search starts from a trained network")
    # The network first: images of a large data set take minutes.
    splits = Splits(config.data)
    classes = splits.check()
    model = load_model(config.model, len(classes))
    calibration = splits.read("train", config.pruning.calibration_images)
    search = splits.read("search")
    test = splits.read("test", 1)
    check_splits({"train": calibration, "search": search, "test": test})
    check_padding(config.finetune, search, "finetune.padding")
    image = search.take(1).tensors()[0]
    check_output(model, image, len(classes))
    return model, calibration, Classification(search), image


def read_own(config: RunConfig, task: OwnTask, model: nn.Module | None) -> Problem:
    """A task of the user's own, with the network given or that of the configuration.

    Raises:
        CacpError: The first thing that does not fit.
    """
    if config.evaluation.racing:
        raise ConfigError("evaluation.racing compares images of classes: leave it out for a task")
    if config.evaluation.images is not None:
        raise ConfigError("evaluation.images: a task of your own says itself what it scores")
    inputs = check_inputs(task.content.example_inputs, f"task {task.name}: example_inputs")
    network = _load_own(config) if model is None else check_network(model).eval()
    fault = f"the network does not run on example_inputs of {describe_shapes(inputs)}"
    with users_code(f"task {task.name}: {fault}"), torch.no_grad():
        call(network, inputs)
    with users_code(f"task {task.name}: calibration gives no batches"):
        batches = iter(task.content.calibration())
    examples = read_examples(batches, inputs, config.pruning.calibration_images)
    run_batch(network, examples.batches[0])
    kinds = needed_kinds(config.pruning.criterion, config.pruning.recovery)
    if "gates" in kinds:
        check_loss(network, examples.batches[0], find_loss(task, config.pruning.criterion, kinds))
    return network, examples, task, inputs


def check_loss(network: nn.Module, batch: Batch, loss: Loss) -> None:
    """Refuses a loss that gives no gradient, before anything is started.

    Raises:
        ConfigError: It fails on a batch, or returns something else than a loss.
    """
    trained = copy.deepcopy(network)
    for parameter in trained.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    with torch.enable_grad():
        mean_loss(trained, batch, loss)


def _load_own(config: RunConfig) -> nn.Module:
    """The network of the configuration; without weights, its function brings them."""
    if config.model.name.startswith(GIVEN):
        raise ConfigError(
            f"model {config.model.name} stands for a network that was given in Python: give a run "
            "the same again, in cacp_ray.search(model=..., resume=True); in a new configuration, "
            "write package.module:function"
        )
    model = check_network(load_model(config.model, None)).eval()
    if config.model.weights is not None:
        return model
    if package_of(config.model.name) is None:
        raise ConfigError("model.weights is missing: a search starts from a trained network")
    again = load_model(config.model, None)
    if hash_weights(again.state_dict()) != hash_weights(model.state_dict()):
        raise ConfigError(
            f"model {config.model.name} has other weights each time that it is called: return the "
            "trained network, or name its weights in model.weights"
        )
    return model


def find_loss(task: Classification | OwnTask, criterion: str, kinds: frozenset[str]) -> Loss:
    """The loss whose gradients a criterion reads.

    Raises:
        ConfigError: The criterion reads gradients, and the task has no loss.
    """
    if isinstance(task, Classification):
        return classify
    loss = getattr(task.content, "loss", None)
    if loss is None and "gates" in kinds:
        raise ConfigError(
            f"pruning.criterion {criterion} reads gradients of a loss, and task {task.name} has no "
            "loss(net, batch): add one, or choose another, such as cap"
        )
    return loss or classify


def configure(
    config: RunConfig | dict[str, Any] | str | Path | None,
    settings: dict[str, Any],
    model: Any,
    task: Any,
) -> tuple[RunConfig, Given | None]:
    """The configuration with what was given as objects, under names that say so."""
    network = None if model is None else check_network(model)
    if network is not None:
        settings = settings | {"model": {"name": f"{GIVEN}{type(network).__name__}"}}
    if task is not None:
        settings = settings | {"task": task if isinstance(task, str) else OBJECT}
    if isinstance(config, RunConfig):
        chosen = load_config(RunConfig, resolved(config) | settings) if settings else config
    else:
        chosen = load_config(RunConfig, {} if config is None else config, settings=settings)
    if chosen.task is None and network is not None:
        raise ConfigError("search(model=...) needs a task, or example_inputs, calibration, score")
    given = Given(
        None if network is None else copy.deepcopy(network).cpu().eval(),
        None if isinstance(task, str) else task,
    )
    return chosen, given if given.parts else None
