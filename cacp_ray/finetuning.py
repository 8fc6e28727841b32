"""Fine-tuning of what a search found, or of one subnet folder: which subnets, by which recipes."""

import dataclasses
import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from torch import nn

from cacp_ray.clock import Clock
from cacp_ray.config import (
    FINETUNE,
    DataConfig,
    FinetuneRecipe,
    ModelConfig,
    RunConfig,
    Section,
)
from cacp_ray.errors import ConfigError
from cacp_ray.files import read_json, write_json
from cacp_ray.loading import (
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
from cacp_ray.training.recipe import Recipe

Logger = Literal["tensorboard", "csv", "json", "wandb", "mlflow"]


logger = logging.getLogger(__name__)


class TrialsConfig(Section):
    """Of the Tune trials."""

    cpus: int | None = Field(
        default=None, ge=1, description="of a trial or worker; cluster.cpus_per_evaluator if unset"
    )
    gpus: float = Field(default=0.0, ge=0, description="of a trial or worker; 0.25: four share one")
    workers: int | tuple[int, int] = Field(
        default=1,
        description="processes that train one model; [2, 8]: as many as there is room for, from "
        "epoch to epoch",
    )
    scheduler: Literal["plain", "asha"] = Field(
        default="plain", description="asha stops the poorer half of a rate's variants at a third"
    )
    logging: tuple[Logger, ...] = Field(
        default=("tensorboard", "csv", "json"), description="beside each trial; wandb, mlflow"
    )

    @field_validator("gpus")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("at most 1, as a process trains on one; more `workers` take more")
        return gpus

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, workers: Any) -> Any:
        numbers = workers if isinstance(workers, (list, tuple)) else [workers, workers]
        is_range = len(numbers) == 2 and all(type(number) is int for number in numbers)
        if not is_range or not 1 <= numbers[0] <= numbers[1]:
            raise ValueError("write one number, or the least and the most: 4, or [2, 8]")
        return workers


class FinetuneConfig(Section):
    """A fine-tuning, as in tune_configs/finetune_*.yaml."""

    finetune: FinetuneRecipe = Recipe(**FINETUNE)
    variants: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by name: what differs from `finetune`; the best is kept"
    )
    trials: TrialsConfig = TrialsConfig()
    # Of a subnet folder that lies outside a run.
    model: ModelConfig | None = Field(default=None, description="base network, the teacher")
    data: DataConfig | None = None

    @property
    def recipes(self) -> dict[str, Recipe]:
        """By variant; the name is empty where there is but one."""
        whole = dataclasses.asdict(self.finetune)
        adapter = TypeAdapter(Recipe)
        return {
            name: adapter.validate_python(whole | changes)
            for name, changes in (self.variants or {"": {}}).items()
        }

    @model_validator(mode="after")
    def _variants_fit(self) -> "FinetuneConfig":
        for name, changes in self.variants.items():
            if not name.replace("-", "").replace("_", "").isalnum():
                raise ValueError(f"variants: {name!r} is no name: letters, digits, - and _")
            if "teacher" in changes:
                raise ValueError(f"variants.{name}.teacher: all variants have one teacher")
        try:
            assert self.recipes
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise ValueError(f"variants: {key}: {problem['msg']}") from error
        return self


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
            on_epoch=on_epoch,
        )
        base = load_model(config.model, len(splits["test"].classes))
        result["base"]["test"] = dict(vars(measure_split(base, splits["test"])))
    for row in result["rates"]:
        tuned = found[row["rate"]]
        row["finetuned_top1"] = tuned.search_top1
        row["test_top1"] = tuned.test_top1
        row["test_images"] = tuned.test_images
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
    distils = any(recipe.distillation > 0 for recipe in settings.recipes.values())
    if settings.model is None and distils:
        raise ConfigError(
            f"{folder} lies in no run: name the base network by --config, in `model`, or set "
            "finetune.distillation to 0"
        )
    classes = read_split(settings.data, "search", 1).classes
    if list(classes) != description.get("classes", list(classes)):
        raise ConfigError(
            f"{folder} was searched on other classes than data.search has: give the data of its run"
        )
    _finetune(
        {description["rate"]: folder},
        settings.model or ModelConfig(name=description["model"]),
        settings.data,
        settings,
        folder / "finetune",
        cpus=settings.trials.cpus or 1,
        resume=resume,
        address=address,
        on_epoch=on_epoch,
    )
    return read_json(folder / "metrics.json")


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
    make_loggers(trials.logging, experiment_dir)
    check_address(address)
    logger.info("reading images, starting the trials")
    train = open_split(data, "train")
    splits = {"search": read_split(data, "search"), "test": open_split(data, "test")}
    check_splits({"train": train, **splits})
    for name, recipe in settings.recipes.items():
        key = f"variants.{name}.padding" if name else "finetune.padding"
        check_padding(recipe, splits["search"], key)
    connect(address)
    least = trials.workers if isinstance(trials.workers, int) else trials.workers[0]
    asked_by = "trials.cpus, trials.gpus, trials.workers"
    check_room(cpus, trials.gpus, address, actors=least, asked_by=asked_by)
    probe_nodes()
    # The weights themselves: their file may be on this machine alone.
    tensors = load_model(model, len(train.classes)).state_dict()
    load_base_model: Callable[[], nn.Module] = partial(
        rebuild_model, model.name, len(train.classes), tensors
    )
    rates = sorted(folders, reverse=True)
    one_by_one = settings.finetune.teacher == "larger"  # which has to be fine-tuned before
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
            source={"model": model.model_dump(), "data": data.model_dump(mode="json")},
        )
    return found, splits
