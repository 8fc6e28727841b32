"""The configuration of a run: one YAML file, checked when it is read, saved resolved with the run.

Defaults live here and in the settings dataclasses; a YAML file says what differs; `--set a.b=1`
changes one value.
"""

from typing import Annotated, Any, Literal, TypeGuard

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from cacp_ray.data.limits import MAX_PIXELS, MAX_SIDE
from cacp_ray.errors import nearest_names
from cacp_ray.io.labels import check_selector
from cacp_ray.io.rates import format_rate, read_rate
from cacp_ray.pruning.cost import COSTS
from cacp_ray.reporting.scalars import Logger
from cacp_ray.searching.settings import AgentSettings, Mode, PaperSettings
from cacp_ray.searching.strategies import ALL_STRATEGIES
from cacp_ray.training.recipe import Recipe

Rate = Annotated[float, BeforeValidator(read_rate), Field(gt=0, le=1)]
Channels = tuple[float, ...]
Positive = Annotated[float, Field(gt=0)]
NUM_CHANNELS = (1, 3)  # of images: gray, and red, green, blue


def is_section(value: Any) -> TypeGuard[dict[str, Any]]:
    """Whether a value of a YAML file holds `key: value` lines."""
    return isinstance(value, dict)


# Defaults of fine-tuning, which starts from a trained network.
FINETUNE: dict[str, Any] = {"epochs": 6, "lr": "auto", "distillation": 0.7, "label_smoothing": 0.0}
FinetuneRecipe = Annotated[
    Recipe, BeforeValidator(lambda given: FINETUNE | given if is_section(given) else given)
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    """Which network, and its trained weights."""

    name: str = Field(
        description="resnet20, torchvision:NAME, timm:NAME or package.module:function"
    )
    kwargs: dict[str, Any] = Field(
        default={}, description="keyword arguments of that function, besides num_classes"
    )
    weights: str | None = Field(
        default=None,
        description="safetensors or .pth file, embedded:NAME, or published ones by name: "
        "IMAGENET1K_V2 of torchvision, pretrained of timm",
    )


class SplitConfig(Section):
    """Rows of labelled images."""

    path: str = Field(
        description="Parquet file, folder or pattern of Parquet shards, or folder with a folder of "
        "images a class; also s3:// and gs://, or embedded:train, embedded:search, embedded:test"
    )
    rows: tuple[int, int] | None = Field(
        default=None, description="first row and the row after the last"
    )
    images_per_class: int | None = Field(
        default=None,
        ge=1,
        description="images drawn by seed; data.search takes them from data.train",
    )
    seed: int = Field(default=0, ge=0, description="seed of images_per_class")


class DataConfig(Section):
    """Three disjoint splits. The test split is measured once, at the end."""

    train: SplitConfig = SplitConfig(path="embedded:train", rows=None)
    search: SplitConfig = SplitConfig(path="embedded:search", rows=None)
    test: SplitConfig = SplitConfig(path="embedded:test", rows=None)
    resize: int | None = Field(
        default=None,
        ge=1,
        le=MAX_SIDE,
        description="length of the shorter side in pixels; unset: unchanged",
    )
    crop: int | None = Field(
        default=None, ge=1, le=MAX_SIDE, description="side of the central square in pixels"
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="interpolation of data.resize"
    )
    max_pixels: int = Field(
        default=MAX_PIXELS, ge=1, le=2**27, description="largest image that is decoded, in pixels"
    )
    num_classes: int | None = Field(
        default=None,
        ge=1,
        le=100_000,
        description="number of classes, where labels are numbers without names and no image has "
        "the largest; unset: one more than the largest label",
    )
    stream: bool = Field(
        default=False,
        description="training and the test split read and decode their images when they need "
        "them, for data sets that memory does not hold",
    )
    mean: Channels | None = Field(
        default=None,
        description="mean of red, green, blue in [0, 1], as in the training of the weights; needed "
        "unless the data is embedded or published weights bring it; one number: images are read "
        "as gray, with one channel",
    )
    std: tuple[Positive, ...] | None = Field(
        default=None, description="deviation of red, green, blue, or of gray, in [0, 1], likewise"
    )

    @field_validator("mean", "std")
    @classmethod
    def _of_gray_or_colours(cls, values: Channels | None) -> Channels | None:
        if values is not None and len(values) not in NUM_CHANNELS:
            raise ValueError(
                f"{len(values)} numbers: give one for gray images or three for colours; images of "
                "other channels are the business of a task of your own (docs/tasks.md)"
            )
        return values


def add_transforms(values: Any) -> Any:
    """Adds the transforms of published weights; what the file says in `data` comes first."""
    model = values.get("model") if is_section(values) else None
    name, weights = (model.get("name"), model.get("weights")) if is_section(model) else (None, None)
    if not isinstance(name, str) or not isinstance(weights, str):
        return values
    from cacp_ray.models.pretrained import describe_weights, is_published

    if not is_published(name, weights):
        return values
    transforms = describe_weights(name, weights).transforms
    return values | {"data": transforms | dict(values.get("data") or {})}


class TrainConfig(Section):
    """A base network to train."""

    name: str
    model: ModelConfig
    data: DataConfig = DataConfig()
    training: Recipe = Recipe()


class PruningConfig(Section):
    """What may be cut, in which order, and how the cut network is repaired."""

    criterion: str = Field(
        default="cap",
        description="importance order: cap, l1, l2, fpgm, bn_scale, cpmc, taylor, group_fisher, "
        "random, or package.module:function",
    )
    recovery: Literal["none", "bn", "compensate"] = "compensate"
    sequential: bool = Field(
        default=True,
        description="after compensate, repair final subnets layer by layer; kept where it is "
        "better on the search split",
    )
    calibration_images: int = Field(default=1000, ge=16, description="images of the training split")
    keep: tuple[str, ...] = Field(
        default=(), description="patterns of modules that stay whole: stem.*"
    )
    uncounted: Literal["refuse", "ignore"] = Field(
        default="refuse",
        description="what follows where an operation has work and no cost formula, so that a rate "
        "may keep more than it says: the search ends, or counts it as nothing",
    )
    floor: float = Field(
        default=0.1, gt=0, le=1, description="smallest share of a group's channels kept"
    )
    round_to: int = Field(default=1, ge=1, description="keep counts are multiples of this")


class EvaluationConfig(Section):
    """How a candidate is scored."""

    batch_size: int | None = Field(
        default=None, ge=1, description="default: as many images as hold 512 x 1024 pixels"
    )
    images: int | None = Field(
        default=None, ge=1, description="images of the search split; default: all"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    racing: bool = Field(
        default=False, description="candidates that fall behind the best of their rate stop early"
    )


class ClusterConfig(Section):
    """The evaluator actors."""

    max_evaluators: int | None = Field(
        default=None,
        ge=1,
        description="evaluators asked of the cluster, which may grow for them; default: as many as "
        "there is room for, and more when nodes join",
    )
    cpus_per_evaluator: int = Field(default=1, ge=1, description="threads of one evaluator")
    gpus_per_evaluator: float | Literal["auto"] = Field(
        default=0.0,
        description="share of a GPU; 0.25: four on each; 0: on CPUs; auto: as its memory allows",
    )

    label_selector: dict[str, str] = Field(
        default={},
        description="labels of the nodes that evaluators and trials run on, such as "
        "{ray.io/market-type: spot, zone: 'in(a, b)', disk: '!slow'}; default: any node",
    )
    runtime_env: dict[str, Any] = Field(
        default={},
        description="Ray's runtime environment of all processes of the cluster, such as "
        "{working_dir: ., pip: [einops], env_vars: {KEY: value}}; it sends your own code along",
    )

    @field_validator("label_selector")
    @classmethod
    def _of_labels(cls, selector: dict[str, str]) -> dict[str, str]:
        return check_selector(selector)

    @field_validator("gpus_per_evaluator", mode="before")
    @classmethod
    def _share_or_auto(cls, gpus: Any) -> Any:
        is_share = isinstance(gpus, float | int) and not isinstance(gpus, bool) and 0 <= gpus <= 1
        if not is_share and gpus != "auto":
            raise ValueError("write a share of a GPU from 0 to 1, or auto")
        return gpus


class WidthsConfig(Section):
    """The training of strategies that learn widths; it follows the recipe `finetune`."""

    epochs: int = Field(
        default=8,
        ge=1,
        description="epochs in which chex, dmcp, scp, network_adjustment or group_fisher learn "
        "widths; those of `finetune` come after them",
    )
    start: str | None = Field(
        default=None,
        description="subnet folder whose widths network_adjustment begins with; unset: uniform",
    )


class ReportConfig(Section):
    """What a search measures for its report after it has ended; nothing is chosen by it."""

    frontier: bool = Field(
        default=True, description="the policy's answers at up to 15 rates from 0.2 to 0.9"
    )
    learning: bool = Field(
        default=True, description="what the policy would have answered at moments of the search"
    )
    latency: bool = Field(
        default=True, description="latency of the base network and of every winner, up to 20 s"
    )


class RunConfig(Section):
    """A search and the fine-tuning of what it finds."""

    name: str = "quickstart"
    model: ModelConfig = ModelConfig(name="resnet20", weights="embedded:resnet20_cifar10")
    task: str | None = Field(
        default=None,
        description="package.module:Class, a task of your own (docs/tasks.md); unset: "
        "classification of the images in `data`",
    )
    data: DataConfig = DataConfig()
    rates: tuple[Rate, ...] = Field(
        default=(0.3, 0.5, 0.7), min_length=1, description="share of cost KEPT"
    )
    cost: str | dict[str, float] = Field(
        default="macs",
        description="what a rate limits: macs, params or latency; or several at once, each with "
        "its weight, the smallest 1: {macs: 1.0, latency: 1.2} keeps at most 1.2 times the rate of "
        "the latency",
    )
    latency_table: str | None = Field(
        default=None, description="Parquet file of `cacp-ray latency measure`, for cost latency"
    )
    strategy: str = Field(
        default="cacp",
        description="a name of docs/strategies.md, or package.module:function",
    )
    evaluations: int = Field(default=240, ge=1, description="distinct candidates over all rates")
    mode: Mode = Field(default="async", description="rounds repeats bit for bit; async never waits")
    round_size: int = Field(default=6, ge=1, description="candidates asked together")
    seed: int = Field(default=0, ge=0)
    pruning: PruningConfig = PruningConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    agent: AgentSettings = Field(default=AgentSettings(), description="settings of strategy cacp")
    paper: PaperSettings = Field(
        default=PaperSettings(), description="settings of strategies cacp-paper and amc"
    )
    widths: WidthsConfig = WidthsConfig()
    cluster: ClusterConfig = ClusterConfig()
    logging: tuple[Logger, ...] = Field(
        default=("tensorboard",),
        description="loggers of the search; wandb and mlflow where installed",
    )
    report: ReportConfig = ReportConfig()
    finetune: FinetuneRecipe = Recipe(**FINETUNE)

    @model_validator(mode="before")
    @classmethod
    def _transforms_of_weights(cls, values: Any) -> Any:
        return add_transforms(values)

    @field_validator("rates")
    @classmethod
    def _sorted_and_distinct(cls, rates: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(map(format_rate, rates))) < len(rates):
            raise ValueError("rates must differ within six decimals")
        return tuple(sorted(rates))

    @field_validator("cost")
    @classmethod
    def _known_costs(cls, cost: str | dict[str, float]) -> str | dict[str, float]:
        for name in [cost] if isinstance(cost, str) else cost:
            if name not in COSTS:
                raise ValueError(nearest_names(name, COSTS))
        if not isinstance(cost, str) and (not cost or min(cost.values()) != 1):
            raise ValueError(
                "the smallest weight must be 1, that of the cost whose share the rate is"
            )
        return cost

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, name: str) -> str:
        if ":" not in name and name not in ALL_STRATEGIES:
            raise ValueError(nearest_names(name, ALL_STRATEGIES))
        return name

    @model_validator(mode="after")
    def _has_latency_table(self) -> "RunConfig":
        names = [self.cost] if isinstance(self.cost, str) else list(self.cost)
        if "latency" in names and self.latency_table is None:
            raise ValueError(
                "cost: latency needs latency_table, a file that `cacp-ray latency measure` made"
            )
        return self

    @model_validator(mode="after")
    def _enough_evaluations(self) -> "RunConfig":
        least = 3 * len(self.rates)
        if self.evaluations < least:
            raise ValueError(
                f"{self.evaluations} evaluations are too few for {len(self.rates)} rates: at least "
                f"{least}, for two uniform candidates and the policy's own answer at each"
            )
        return self
