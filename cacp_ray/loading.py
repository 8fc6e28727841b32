"""From a configuration to objects: the base network, its data, the slicing plan, the budget."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.config import DataConfig, ModelConfig, PruningConfig, RunConfig
from cacp_ray.data.images import ImageSet, Rows, Shape, read_images, read_labels
from cacp_ray.data.sources import Source, have_common_rows, open_source
from cacp_ray.data.streams import ImageStream, open_stream
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.latency_table import LatencyTable, load_table
from cacp_ray.evaluation.preparation import Prepared, hash_weights, needed_kinds, prepare
from cacp_ray.files import read_object
from cacp_ray.models.factory import build_model, copy_weights, load_weights
from cacp_ray.models.pretrained import is_published, read_weights
from cacp_ray.pruning.cost import Limited
from cacp_ray.pruning.criteria import get_criterion
from cacp_ray.pruning.plan import Plan, make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.statistics_file import load_statistics, save_statistics, statistics_key
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.strategies import OTHER_ORDERS
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)

STATISTICS_FILE = "statistics.safetensors"


# Opened by path, where several splits are read: listing files and reading labels takes a while.
Sources = dict[str, Source]


@dataclass(frozen=True)
class Base:
    """The trained network of a run and the images that judge it.

    Attributes:
        model: With its weights, in evaluation mode.
        sha256: Of the weights.
        plan: How it may be cut.
        budget: Of the run's cost; every rate of the run is reachable.
        calibration: Training images, for statistics only.
        search: The search split.
        latency: Table of the run's layers, if it names one.
    """

    model: nn.Module
    sha256: str
    plan: Plan
    budget: Budget
    calibration: ImageSet
    search: ImageSet
    latency: LatencyTable | None = None


def read_split(
    data: DataConfig, name: str, count: int | None = None, sources: Sources | None = None
) -> ImageSet:
    """Decodes a split, or `count` of its images, evenly spaced."""
    source, rows = _find_rows(data, name, sources)
    images = read_images(source, dataclasses.replace(rows, count=count), _shape(data))
    return dataclasses.replace(images, mean=data.mean, std=data.std)


def open_split(
    data: DataConfig, name: str, sources: Sources | None = None
) -> ImageSet | ImageStream:
    """A split in memory, or with `data.stream` where it lies."""
    if not data.stream:
        return read_split(data, name, sources=sources)
    source, rows = _find_rows(data, name, sources)
    stream = open_stream(source, rows, _shape(data))
    return dataclasses.replace(stream, mean=data.mean, std=data.std)


def _shape(data: DataConfig) -> Shape:
    return Shape(data.resize, data.crop, data.interpolation)


def _find_rows(data: DataConfig, name: str, sources: Sources | None) -> tuple[Source, Rows]:
    """Where a split lies; the training split leaves out what the search split draws from it."""
    split, search = getattr(data, name), data.search
    source = _open(split.path, sources)
    rows = Rows(split.rows, split.images_per_class, seed=split.seed)
    if name == "train" and search.images_per_class and _is_at(source, search.path, sources):
        if split.rows != search.rows:
            raise ConfigError(
                "data.search.images_per_class draws from the rows of data.train: give both the "
                "same rows, or none"
            )
        if split.images_per_class:
            raise ConfigError(
                "data.train.images_per_class: the training split is all that data.search leaves of "
                "these images; leave it out, or give the two splits other files"
            )
        rows = Rows(split.rows, search.images_per_class, without=True, seed=search.seed)
    return source, rows


def _open(path: str, sources: Sources | None) -> Source:
    known = sources if sources is not None else {}
    if path not in known:
        known[path] = open_source(path)
    return known[path]


def _is_at(source: Source, path: str, sources: Sources | None) -> bool:
    """Whether a path, however it is spelled, has the very files of a source."""
    return source.name == path or source.resolved == _open(path, sources).resolved


def check_data(data: DataConfig, sources: Sources | None = None) -> tuple[str, ...]:
    """Opens all three splits and reads their labels.

    Returns:
        The class names, which are the same in all.

    Raises:
        CacpError: Naming the file and row, or two splits that share rows or differ in classes.
    """
    seen: dict[str, tuple[Source, NDArray[np.int64]]] = {}
    first: tuple[str, ...] = ()
    for name in ("train", "search", "test"):
        source, chosen = _find_rows(data, name, sources)
        rows, _, classes = read_labels(source, chosen)
        for other, (known, others) in seen.items():
            if have_common_rows(known, others, source, rows):
                raise ConfigError(
                    f"data.{name} and data.{other} share rows of {source.name}: splits must be "
                    "disjoint, or candidates are judged by what was learned"
                )
        seen[name] = source, rows
        first = first or classes
        if classes != first:
            raise ConfigError(
                f"data.{name} has {_describe_classes(classes)}, data.train "
                f"{_describe_classes(first)}: all splits must be alike"
            )
    return first


def _describe_classes(classes: tuple[str, ...]) -> str:
    return f"{len(classes)} classes, {classes[0]} to {classes[-1]}"


def check_weights(base: Base, run_dir: Path) -> None:
    """Refuses to go on with other base weights, or another latency table, than a run began with.

    Raises:
        ArtifactError: The hash in model.json differs, or what the whole network costs.
    """
    model = read_object(run_dir / "model.json", ("sha256",))
    cost = model.get("base", {}).get("cost", base.budget.total)
    if cost != base.budget.total:
        raise ArtifactError(
            f"{run_dir}: the whole network cost {cost:,} when the search began and costs "
            f"{base.budget.total:,} now: put the latency table back, or search again in another "
            "--run-dir"
        )
    if model["sha256"] != base.sha256:
        raise ArtifactError(
            f"{run_dir} was searched from other weights than model.weights holds now: put them "
            "back or search again in another --run-dir"
        )


def check_splits(splits: Mapping[str, ImageSet | ImageStream]) -> None:
    """Refuses splits of different classes or image sizes; of a stream the first image is read.

    Raises:
        ConfigError: Naming both splits.
    """
    (first_name, first), *others = (
        (name, split.at(np.arange(1)) if isinstance(split, ImageStream) else split)
        for name, split in splits.items()
    )
    for name, split in others:
        if split.classes != first.classes or split.images.shape[1:] != first.images.shape[1:]:
            raise ConfigError(
                f"data.{name} has {len(split.classes)} classes of {split.images.shape[1:]} images, "
                f"data.{first_name} {len(first.classes)} of {first.images.shape[1:]}: "
                "all splits must be alike"
            )


def check_padding(recipe: Recipe, split: ImageSet, key: str) -> None:
    """Refuses random crops that would hold nothing of some images.

    Raises:
        ConfigError: Naming `key`.
    """
    side = min(split.images.shape[1:3])
    if recipe.padding >= side:
        raise ConfigError(f"{key}: {recipe.padding} pixels, but images have {side}; give fewer")


def load_model(config: ModelConfig, num_classes: int) -> nn.Module:
    """The base network in evaluation mode."""
    model = build_model(config.name, num_classes)
    if config.weights is not None and is_published(config.name, config.weights):
        tensors = read_weights(config.name, config.weights)
        copy_weights(model, tensors, f"{config.weights} of {config.name}")
    elif config.weights is not None:
        load_weights(model, config.weights)
    return model.eval()


def warn_of_normalisation(config: RunConfig) -> None:
    """Says that images are normalised as CIFAR-10's where a file of weights may expect others."""
    model, data = config.model, config.data
    has_file = model.weights is not None and not is_published(model.name, model.weights)
    if (
        has_file
        and model.name.startswith(("torchvision:", "timm:"))
        and not data.train.path.startswith("embedded:")
        and not {"mean", "std"} <= data.model_fields_set
    ):
        logger.warning(
            "weights %s of %s: data.mean and data.std are not both set, and what is missing is "
            "CIFAR-10's: set them as in the training of these weights",
            model.weights,
            model.name,
        )


def rebuild_model(name: str, num_classes: int, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The network of `load_model` where its file of weights may not be, such as on another node."""
    model = build_model(name, num_classes)
    copy_weights(model, tensors, f"the base network {name}")
    return model.eval()


def load_base(config: RunConfig) -> Base:
    """Reads and checks what a search needs before anything is written.

    Raises:
        CacpError: The first thing that does not fit, in one line.
    """
    get_criterion(config.pruning.criterion)
    if config.model.weights is None:
        raise ConfigError("model.weights is missing: a search starts from a trained network")
    warn_of_normalisation(config)
    # The network first: images of a large data set take minutes.
    sources: Sources = {}
    classes = check_data(config.data, sources)
    model = load_model(config.model, len(classes))
    calibration = read_split(config.data, "train", config.pruning.calibration_images, sources)
    search = read_split(config.data, "search", sources=sources)
    test = read_split(config.data, "test", 1, sources)
    check_splits({"train": calibration, "search": search, "test": test})
    check_padding(config.finetune, search, "finetune.padding")
    plan = make_plan(model, search.take(1).tensors()[0])
    table = None
    if config.latency_table is not None:
        table = load_table(config.latency_table)
        plan = with_latency(plan, table)
        for difference in table.differences(config.model.name, config.pruning.round_to):
            logger.warning("latency table %s: %s", config.latency_table, difference)
    budget = make_budget(plan, config.cost, config.pruning)
    for rate in config.rates:
        budget.check(rate)
    return Base(model, hash_weights(model.state_dict()), plan, budget, calibration, search, table)


def key_of_statistics(base: Base, config: RunConfig) -> str:
    """Says what `find_statistics` collects: the same key, the same statistics."""
    kinds = needed_kinds(config.pruning.criterion, config.pruning.recovery)
    return statistics_key(base.sha256, base.plan, base.calibration, seed=config.seed, kinds=kinds)


def find_statistics(base: Base, config: RunConfig, run_dir: Path | None) -> Statistics:
    """What the criterion and the recovery read of the calibration images.

    Args:
        base: Of the run.
        config: Of the run.
        run_dir: Its folder: statistics saved there are read; where they are missing, damaged or of
            other weights, images or settings, they are collected and, if the run has begun, saved.
            None collects.
    """
    key = key_of_statistics(base, config)
    if run_dir is not None:
        found = load_statistics(run_dir / STATISTICS_FILE, key)
        if found is not None:
            return found
    kinds = needed_kinds(config.pruning.criterion, config.pruning.recovery)
    images, labels = base.calibration.tensors()
    statistics = collect_statistics(
        base.model, base.plan, images, labels, seed=config.seed, kinds=kinds
    )
    if run_dir is not None and (run_dir / "config.yaml").exists():
        save_statistics(run_dir / STATISTICS_FILE, statistics, key)
    return statistics


def prepare_base(
    base: Base,
    config: RunConfig,
    orders: Mapping[str, list[list[int]]] | None = None,
    statistics: Statistics | None = None,
) -> Prepared:
    """Importance orders, the run's and those its strategy compares, and compensation factors.

    Args:
        base: Of the run.
        config: Of the run.
        orders: Those of the run, to repeat them; see `read_orders`.
        statistics: Of `find_statistics`; collected when None.
    """
    collected = statistics if statistics is not None else find_statistics(base, config, None)
    found = {
        name: prepare(
            base.model,
            base.plan,
            base.calibration,
            collected,
            criterion=name or config.pruning.criterion,
            recovery=config.pruning.recovery,
            seed=config.seed,
            orders=None if orders is None else [np.array(order) for order in orders[name]],
        )
        for name in ("", *OTHER_ORDERS.get(config.strategy, ()))
    }
    return dataclasses.replace(found.pop(""), others=found)


def read_orders(model: dict[str, Any]) -> dict[str, list[list[int]]]:
    """Importance orders in the content of model.json, by criterion; the run's own under ""."""
    return {"": [group["order"] for group in model["groups"]], **model.get("orders", {})}


def with_latency(plan: Plan, table: LatencyTable) -> Plan:
    """The same plan, whose cost model knows the latency of keep counts.

    Raises:
        ConfigError: The table lacks layers of the network.
    """
    latency = table.cost(plan.cost_model)
    return dataclasses.replace(
        plan, cost_model=dataclasses.replace(plan.cost_model, latency=latency)
    )


def make_budget(plan: Plan, cost: Limited, pruning: PruningConfig) -> Budget:
    """The budget of a cost (`CostModel.kind`); groups that match a keep pattern stay whole."""
    num_channels = plan.cost_model.num_channels
    least = np.maximum(
        minimum_counts(num_channels, pruning.floor, pruning.round_to), plan.least_counts
    )
    prunable = plan.select_groups(pruning.keep)
    return Budget(
        plan.cost_model.kind(cost),
        num_channels,
        np.where(prunable, least, num_channels),
        pruning.round_to,
    )
