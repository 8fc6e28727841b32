"""The configuration of a fine-tuning: recipes, and the resources of its trials."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, cast

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from cacp_ray.config.run import (
    FINETUNE,
    DataConfig,
    FinetuneRecipe,
    ModelConfig,
    Section,
    add_transforms,
    is_section,
)
from cacp_ray.io.labels import check_selector
from cacp_ray.training.recipe import Recipe

Logger = Literal["tensorboard", "csv", "json", "wandb", "mlflow"]


class TrialsConfig(Section):
    """Resources, scheduling and logging of the Tune trials."""

    cpus: int | None = Field(
        default=None,
        ge=1,
        description="CPUs of a trial or worker; default: cluster.cpus_per_evaluator, and where one "
        "trial runs at a time all of the largest node",
    )
    gpus: float = Field(
        default=0.0, ge=0, description="GPUs of a trial or worker; 0.25: four share one"
    )
    workers: int | tuple[int, int] = Field(
        default=1,
        description="processes that train one model; [2, 8]: as many as there is room for, counted "
        "anew at each epoch",
    )
    label_selector: dict[str, str] | None = Field(
        default=None,
        description="labels of the nodes that trials run on; default: cluster.label_selector",
    )
    scheduler: Literal["plain", "asha"] = Field(
        default="plain", description="asha stops the poorer half of a rate's variants at a third"
    )
    logging: tuple[Logger, ...] = Field(
        default=("tensorboard", "csv", "json"),
        description="loggers of each trial; also wandb, mlflow",
    )

    @field_validator("label_selector")
    @classmethod
    def _of_labels(cls, selector: dict[str, str] | None) -> dict[str, str] | None:
        return None if selector is None else check_selector(selector)

    @field_validator("gpus")
    @classmethod
    def _share_or_whole(cls, gpus: float) -> float:
        if gpus > 1:
            raise ValueError("at most 1, as a process trains on one; more `workers` take more")
        return gpus

    @model_validator(mode="after")
    def _a_gpu_each(self) -> "TrialsConfig":
        if self.workers != 1 and 0 < self.gpus < 1:
            raise ValueError("gpus: workers of one trial need 1 each, as NCCL shares none")
        return self

    @field_validator("workers", mode="before")
    @classmethod
    def _number_or_range(cls, workers: Any) -> Any:
        is_pair = isinstance(workers, list | tuple)
        numbers = list(cast("Sequence[Any]", workers)) if is_pair else [workers, workers]
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
    # For a subnet folder that lies outside a run.
    model: ModelConfig | None = Field(default=None, description="base network, the teacher")
    data: DataConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _transforms_of_weights(cls, values: Any) -> Any:
        # With `data` alone: a file that leaves it out takes that of the run.
        has_data = is_section(values) and values.get("data")
        return add_transforms(values) if has_data else values

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
            if shared := changes.keys() & {"teacher", "order"}:
                key = min(shared)
                raise ValueError(f"variants.{name}.{key}: all variants have one {key}")
        try:
            assert self.recipes
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            message = problem["msg"].removeprefix("Value error, ")
            raise ValueError(f"variants: {key}: {message}") from error
        return self
