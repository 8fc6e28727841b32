"""Fine-tuning of what a search found, or of one subnet folder: which subnets, by which recipes."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from cacp_ray.clock import Clock
from cacp_ray.config import DataConfig, ModelConfig, RunConfig
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.files import read_json, write_json
from cacp_ray.finetune_config import FinetuneConfig
from cacp_ray.loading import (
    Sources,
    check_padding,
    check_splits,
    check_weights,
    load_base,
    load_model,
    open_split,
    read_split,
    rebuild_model,
)
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.results import read_result
from cacp_ray.training.metrics import measure_split

logger = logging.getLogger(__name__)

EXPERIMENT_FILE = "finetune.json"  # which `cacp_ray.tuning.finetune` writes


def finetune_run(
    config: RunConfig,
    run_dir: Path,
    settings: FinetuneConfig,
    *,
    resume: bool,
    address: str | None,
    on_epoch: Callable[[Any], None],
) -> dict[str, Any]:
    """Fine-tunes the subnet of every rate as Tune trials and completes result.json.

    Args:
        config: Of the run.
        run_dir: Of a finished search.
        settings: What is trained.
        resume: Go on with an interrupted fine-tuning.
        address: Of a Ray cluster.
        on_epoch: Called with every finished epoch.

    Raises:
        CacpError: Bad input, or a trial that failed too often.
    """
    clock = Clock()
    result = read_result(run_dir)
    if (settings.model, settings.data) != (config.model, config.data):
        raise ConfigError(
            f"{run_dir} was searched with another `model` or `data`: leave both out of --config "
            "and --set"
        )
    check_weights(load_base(config), run_dir)
    folders = {row["rate"]: run_dir / row["path"] for row in result["rates"]}
    trained: list[Any] = []

    def note(progress: Any) -> None:
        if not progress.is_restored:
            trained.append(progress)
        on_epoch(progress)

    with clock.phase("finetune"):
        found, splits = _finetune(
            folders,
            config.model,
            config.data,
            settings,
            run_dir / "finetune",
            cpus=settings.trials.cpus or config.cluster.cpus_per_evaluator,
            resume=resume,
            address=address,
            on_epoch=note,
        )
        if result["base"]["test"] is None:
            base = load_model(config.model, len(splits["test"].classes))
            result["base"]["test"] = dict(vars(measure_split(base, splits["test"])))
    for row in result["rates"]:
        tuned = found[row["rate"]]
        row["finetuned_top1"] = tuned.search_top1
        row["test_top1"] = tuned.test_top1
        row["test_images"] = tuned.test_images
    if trained or "finetune" not in result["seconds"]:  # else it had been finished before
        result["seconds"] |= clock.seconds
    write_json(run_dir / "result.json", result)
    return result


def finetune_folder(
    folder: Path,
    settings: FinetuneConfig,
    *,
    resume: bool,
    address: str | None,
    on_epoch: Callable[[Any], None],
) -> dict[str, Any]:
    """Fine-tunes one subnet folder, wherever it lies; Tune's files are in its `finetune`.

    Args:
        folder: Of a subnet.
        settings: With `data`, and with `model` where the recipe distils.
        resume: Go on with an interrupted fine-tuning.
        address: Of a Ray cluster.
        on_epoch: Called with every finished epoch.

    Returns:
        The content of its metrics.json.

    Raises:
        CacpError: Bad input, or a trial that failed too often.
    """
    description = read_description(folder)
    if settings.data is None:
        raise ConfigError(f"{folder} lies in no run: give its data by --config, in `data`")
    if settings.finetune.teacher == "larger":
        raise ConfigError(
            f"finetune.teacher larger: {folder} alone has no larger subnet: fine-tune its run, or "
            "set finetune.teacher=base"
        )
    distils = any(recipe.distillation > 0 for recipe in settings.recipes.values())
    if distils and (settings.model is None or settings.model.weights is None):
        raise ConfigError(
            f"{folder} lies in no run: name the base network and its weights by --config, in "
            "`model`, or set finetune.distillation to 0"
        )
    data = _as_searched(settings.data, description)
    first = read_split(data, "search", 1)
    classes = first.classes
    if list(classes) != description.get("classes", list(classes)):
        raise ConfigError(
            f"{folder} was searched on other classes than data.search has: give the data of its run"
        )
    height, width = first.images.shape[1:3]
    if description.get("input_shape", [3, height, width])[1:] != [height, width]:
        raise ConfigError(
            f"{folder} was searched on images of {description['input_shape'][1:]} pixels, "
            f"data.search has {[height, width]}: set data.resize and data.crop as in its run"
        )
    _finetune(
        {description["rate"]: folder},
        settings.model or ModelConfig(name=description["model"]),
        data,
        settings,
        folder / "finetune",
        cpus=settings.trials.cpus or 1,
        resume=resume,
        address=address,
        on_epoch=on_epoch,
    )
    return read_json(folder / "metrics.json")


def _as_searched(data: DataConfig, description: Mapping[str, Any]) -> DataConfig:
    """With the normalisation that a subnet was searched with, unless the file has its own."""
    own = {
        name: tuple(description[name])
        for name in ("mean", "std")
        if name in description and name not in data.model_fields_set
    }
    return data.model_copy(update=own)


def _finetune(
    folders: dict[float, Path],
    model: ModelConfig,
    data: DataConfig,
    settings: FinetuneConfig,
    experiment_dir: Path,
    *,
    cpus: int,
    resume: bool,
    address: str | None,
    on_epoch: Callable[[Any], None],
) -> tuple[Mapping[float, Any], Mapping[str, Any]]:
    """Results by rate, and the splits."""
    from cacp_ray.distributed.cluster import check_address, check_room, connect
    from cacp_ray.distributed.probe import probe_nodes
    from cacp_ray.tuning.finetune import finetune_subnets, make_loggers
    from cacp_ray.tuning.trial import Resources

    trials = settings.trials
    project = experiment_dir.parent.name
    make_loggers(trials.logging, project)
    one_by_one = settings.finetune.teacher == "larger"  # which has to be fine-tuned before
    _check_teacher(experiment_dir, one_by_one)
    check_address(address)
    logger.info("reading images, starting the trials")
    sources: Sources = {}
    train = open_split(data, "train", sources)
    splits = {
        "search": read_split(data, "search", sources=sources),
        "test": open_split(data, "test", sources),
    }
    check_splits({"train": train, **splits})
    for name, recipe in settings.recipes.items():
        key = f"variants.{name}.padding" if name else "finetune.padding"
        check_padding(recipe, splits["search"], key)
    connect(address)
    least = trials.workers if isinstance(trials.workers, int) else trials.workers[0]
    asked_by = "trials.cpus, trials.gpus, trials.workers"
    check_room(cpus, trials.gpus, address, actors=least, asked_by=asked_by)
    streams = [split for split in (train, splits["test"]) if isinstance(split, ImageStream)]
    probe_nodes([experiment_dir.parent], streams)
    # The weights themselves: their file may be on this machine alone.
    tensors = load_model(model, len(train.classes)).state_dict()
    load_base_model: Callable[[], nn.Module] = partial(
        rebuild_model, model.name, len(train.classes), tensors
    )
    rates = sorted(folders, reverse=True)
    found: dict[float, Any] = {}
    for group in [[rate] for rate in rates] if one_by_one else [rates]:
        larger = [rate for rate in rates if rate > group[0]]
        load_teacher = load_base_model
        if one_by_one and larger:
            load_teacher = partial(load_subnet, folders[larger[-1]].resolve(), finetuned=True)
        where = experiment_dir / f"rate-{group[0]:g}" if one_by_one else experiment_dir
        found |= finetune_subnets(
            load_subnet=partial(load_subnet, finetuned=False),
            load_teacher=load_teacher,
            subnet_folders={rate: folders[rate] for rate in group},
            train_split=train,
            search_split=splits["search"],
            test_split=splits["test"],
            recipes=settings.recipes,
            experiment_dir=where,
            resources=Resources(cpus, trials.gpus, trials.workers),
            resume=resume,
            on_epoch=on_epoch,
            stops_poor=trials.scheduler == "asha",
            loggers=trials.logging,
            project=project,
            source={"model": model.model_dump(), "data": data.model_dump(mode="json")},
        )
    return found, splits


def _check_teacher(experiment_dir: Path, one_by_one: bool) -> None:
    """Refuses to write over what another teacher has taught."""
    others = [experiment_dir] if one_by_one else experiment_dir.glob("rate-*")
    if any((folder / EXPERIMENT_FILE).exists() for folder in others):
        raise ArtifactError(
            f"{experiment_dir} was begun with another finetune.teacher: undo the change, or delete "
            "that folder to fine-tune again"
        )
