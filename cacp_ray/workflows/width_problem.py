"""What a strategy that learns widths is given, from the configuration of a run."""

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np

from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.pruning.subnet import read_description
from cacp_ray.pruning.surgery import Orders
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.widths.method import WidthProblem
from cacp_ray.searching.widths.table import make_method
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits, check_padding


def check_widths(setup: Setup) -> None:
    """Refuses what a strategy that learns widths cannot do, before anything is written.

    Raises:
        ConfigError: What does not fit, in one line.
    """
    config = setup.config
    name = config.strategy
    if isinstance(setup.task, OwnTask):
        raise ConfigError(
            f"strategy {name} trains a classifier of the images in `data`: a task of your own has "
            "its own training, so choose a strategy that searches"
        )
    if config.cluster.gpus_per_evaluator == "auto":
        raise ConfigError(
            "cluster.gpus_per_evaluator: auto measures the memory of scoring, not of training; "
            f"give a share of a GPU for strategy {name}"
        )
    if config.widths.start is not None and name != "network_adjustment":
        raise ConfigError(f"widths.start is for network_adjustment: leave it out for {name}")
    check_padding(config.finetune, setup.search, "finetune.padding")
    whole = [np.arange(group.num_channels) for group in setup.plan.groups]
    make_method(name, make_problem(setup, whole), copy.deepcopy(setup.model))


def make_problem(setup: Setup, orders: Orders) -> WidthProblem:
    """What the method is given, with all rates of the run."""
    config, recipe = setup.config, read_recipe(setup.config)
    start = None
    if config.widths.start is not None:
        orders, start = _read_start(setup, Path(config.widths.start), orders)
    return WidthProblem(
        plan=setup.plan,
        budget=setup.budget,
        cost=config.cost if isinstance(config.cost, str) else "several",
        rates=config.rates,
        orders=orders,
        steps=recipe.epochs * -(-Splits(config.data).count("train") // recipe.batch_size),
        seed=config.seed,
        start=start,
    )


def read_recipe(config: RunConfig) -> Recipe:
    """The recipe of the fine-tuning, with the epochs in which widths are learned."""
    return replace(config.finetune, epochs=config.widths.epochs, ema=0.0)


def _read_start(setup: Setup, folder: Path, orders: Orders) -> tuple[Orders, Ints]:
    """Orders that begin with the channels of a subnet, and its widths.

    Raises:
        ArtifactError: The folder holds no subnet.
        ConfigError: It is a subnet of another network.
    """
    description = read_description(folder, "keep_counts", "groups")
    groups = [(group["name"], group["num_channels"]) for group in description["groups"]]
    if groups != [(group.name, group.num_channels) for group in setup.plan.groups]:
        raise ConfigError(f"widths.start: {folder} is a subnet of another network than model.name")
    first = [
        np.concatenate([group["kept"], np.setdiff1d(order, group["kept"], assume_unique=True)])
        for group, order in zip(description["groups"], orders, strict=True)
    ]
    return [order.astype(np.int64) for order in first], np.array(description["keep_counts"])
