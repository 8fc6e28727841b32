"""What the JSON files of a run hold, as far as commands read it.

A command names the keys that it needs (`read_checked`); the models say what they must be.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import parse_json
from cacp_ray.io.jsonl import read_journal
from cacp_ray.io.schema import (
    Content,
    Count,
    InnerPath,
    Name,
    Rate,
    Score,
    Seconds,
    Share,
    Size,
    find_problem,
)

LEARNING_FILE = "learning.jsonl"
BENCHMARK_FILE = "benchmark.json"

SHA256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class MetricEntry(Content):
    """What scores measure."""

    name: Name
    is_share: bool


class Measured(Content):
    """An accuracy on a split."""

    score: Score
    images: Count


class SavedBase(Content):
    """The whole network, as a search found it."""

    cost: Count | None = None
    macs: Count | None = None
    search: Measured


class ComparedBase(Content):
    """The same, with what a comparison needs."""

    macs: Count
    search: Measured


class ComparedModel(Content):
    """model.json, with what a comparison needs."""

    sha256: str
    metric: MetricEntry
    base: ComparedBase


class Base(Content):
    """The whole network, with all that a report shows."""

    macs: Count
    params: Count
    cost: Count | None = None
    model: Name
    search: Measured | None = None
    batch_latency_ms: Seconds | None = None
    predicted_latency_ms: Seconds | None = None
    measured_latency_ms: Seconds | None = None
    test: Measured | None = None
    latency_ms: Seconds | None = None


class Group(Content):
    """Channels that are cut together."""

    name: Name
    num_channels: Size
    is_residual: bool


def _is_order(order: list[int]) -> list[int]:
    if sorted(order) != list(range(len(order))):
        raise ValueError("no order of channels")
    return order


Order = Annotated[list[int], AfterValidator(_is_order)]


class OrderedGroup(Group):
    """A group with the importance order that a search used."""

    members: list[Name]
    order: Order

    @model_validator(mode="after")
    def _fits(self) -> "OrderedGroup":
        if len(self.order) != self.num_channels:
            raise ValueError(f"{self.name} orders {len(self.order)} of {self.num_channels}")
        return self


class ModelFile(Content):
    """model.json."""

    model: Name | None = None
    sha256: str | None = None
    input_shape: Annotated[list[Size], Field(max_length=5)] | None = None
    classes: Annotated[list[str], Field(min_length=1)] | None = None
    groups: list[OrderedGroup] | None = None
    orders: dict[str, list[Order]] | None = None
    metric: MetricEntry | None = None
    base: SavedBase | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ModelFile":
        sizes = [group.num_channels for group in self.groups or ()]
        for criterion, orders in (self.orders or {}).items():
            if [len(order) for order in orders] != sizes:
                raise ValueError(f"orders of {criterion} do not fit the groups")
        return self


class RateRow(Content):
    """The subnet of a rate."""

    rate: Rate
    path: InnerPath


class ResultFile(Content):
    """result.json of a search, as far as its subnets are read."""

    rates: Annotated[list[RateRow], Field(min_length=1)]


class ReportedRow(RateRow):
    """The subnet of a rate, with all that a report shows."""

    cost_kept: Rate
    macs: Count
    params: Count
    keep_counts: list[Size]
    search_score: Score | None = None
    search_images: Count | None = None
    policy_score: Score | None = None
    score: Score | None = None
    uniform_score: Score | None = None
    finetuned_score: Score | None = None
    test_score: Score | None = None
    test_images: Count | None = None
    search_recovered_score: Score | None = None
    policy_recovered_score: Score | None = None
    latency_ms: Seconds | None = None
    speedup: Seconds | None = None
    batch_latency_ms: Seconds | None = None
    batch_speedup: Seconds | None = None
    predicted_latency_ms: Seconds | None = None
    measured_latency_ms: Seconds | None = None
    cut_from: Rate | None = None
    learned: bool | None = None  # widths and weights come from a training, not from a search


class FrontierRow(Content):
    """An answer of the policy."""

    rate: Rate
    cost_kept: Rate
    macs: Count
    score: Score


class TrainedRow(FrontierRow):
    """A network cut from a trained one."""

    cut_from: Rate


class PolicyPoint(Content):
    """What the policy was worth amid a search."""

    evaluations: Count
    rate: Rate
    seen: bool
    score: Score
    images: Count


class Learning(Content):
    """How the policy learned."""

    images: Count | None = None
    policy_score: list[PolicyPoint] | None = None


class ReportedFile(Content):
    """result.json of a search, with all that a report shows."""

    rates: Annotated[list[ReportedRow], Field(min_length=1)]
    name: Name
    strategy: Name
    evaluations: Count
    latency_batch: Count | None = None
    cost: str
    metric: MetricEntry
    groups: list[Group]
    base: Base
    frontier: list[FrontierRow]
    trained_frontier: list[TrainedRow] | None = None
    learning: Learning | None = None
    seconds: dict[str, Seconds | None]

    @model_validator(mode="after")
    def _fits(self) -> "ReportedFile":
        whole = [group.num_channels for group in self.groups]
        for row in self.rates:
            fits = len(row.keep_counts) == len(whole) and all(
                kept <= channels for kept, channels in zip(row.keep_counts, whole, strict=True)
            )
            if not fits:
                raise ValueError(f"rate {row.rate:g}: keep_counts do not fit the groups")
        return self


class TimedFormat(Content):
    """Latency at one batch size."""

    batch: Annotated[int, Field(ge=1)]
    median_ms: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    quartiles_ms: Annotated[list[Seconds], Field(min_length=2, max_length=2)]
    speedup: Annotated[float, Field(gt=0, allow_inf_nan=False)]


class BenchmarkRow(Content):
    """A network in one format."""

    network: Annotated[str, Field(pattern=r"^(base|[0-9.]+)$")]
    format: Name
    size: Count
    score: Score
    latency: Annotated[list[TimedFormat], Field(min_length=1)]


class BenchmarkReference(Content):
    """What speeds are compared with."""

    network: Name
    format: Name


class BenchmarkFile(Content):
    """benchmark.json: networks of a run in the formats that deploy them."""

    metric: MetricEntry
    images: Count
    threads: Annotated[int, Field(ge=1)]
    reference: BenchmarkReference
    rows: Annotated[list[BenchmarkRow], Field(min_length=1)]

    @model_validator(mode="after")
    def _fits(self) -> "BenchmarkFile":
        if len({tuple(timed.batch for timed in row.latency) for row in self.rows}) > 1:
            raise ValueError("rows have other batch sizes than the first")
        return self


class ComparedRow(Content):
    """The subnet of a rate, with what a comparison shows."""

    rate: Rate
    search_score: Score | None = None
    policy_score: Score | None = None


class ComparedPoint(Content):
    """An answer of the policy, likewise."""

    rate: Rate
    cost_kept: Rate
    score: Score


class ComparedFile(Content):
    """result.json of a search, with what a comparison shows."""

    rates: Annotated[list[ComparedRow], Field(min_length=1)]
    evaluations: Count
    frontier: list[ComparedPoint]
    seconds: dict[str, Seconds | None]


class FileEntry(Content):
    """A file of a checkpoint."""

    size: Count
    sha256: SHA256


class CheckpointEntry(Content):
    """A checkpoint."""

    name: Annotated[str, Field(pattern=r"^checkpoint-\d{6}$")]
    told: Count
    files: dict[InnerPath, FileEntry]


class LatestFile(Content):
    """checkpoints/LATEST.json."""

    checkpoints: list[CheckpointEntry]


class LearningLine(Content):
    """A line of learning.jsonl."""

    evaluations: Count
    critic_loss: float | None
    noise: dict[str, float | None]
    cached_share: Share | None
    reward: Annotated[dict[str, float | None], Field(min_length=1)]
    policy: dict[str, list[Size] | None]


def read_learning(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of `learning.jsonl`; a last one that a kill cut short is left out.

    Raises:
        ArtifactError: An earlier line is damaged, or lines are of different rates.
    """
    file = run_dir / LEARNING_FILE
    lines = read_journal(file, "about the agent's learning", _parse_learning)
    for key in ("reward", "noise", "policy"):
        if len({tuple(sorted(line[key])) for line in lines}) > 1:
            raise ArtifactError(f"{file}: {key} is of different rates in its lines; restore it")
    return lines


def _parse_learning(line: bytes) -> dict[str, Any]:
    content = parse_json(line)
    if problem := find_problem(content, LearningLine):
        raise ValueError(problem)
    return content


class Epoch(Content):
    """An epoch of a training."""

    search_score: Score


class MetricsFile(Content):
    """metrics.json of a fine-tuned subnet."""

    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None
    best_epoch: Count | None = None
    score: Score | None = None
    search_score_before: Score | None = None
    seconds: Seconds | None = None
    rate: Rate | None = None
    search_score: Score | None = None
    search_images: Count | None = None
    test_score: Score | None = None
    test_images: Count | None = None
    history: list[Epoch] | None = None

    @model_validator(mode="after")
    def _fits(self) -> "MetricsFile":
        history, best = self.history, self.best_epoch
        if history is not None and best is not None and best > len(history):
            raise ValueError(f"best_epoch {best} of {len(history)} in its history")
        return self


class TrialRow(Content):
    """A trial of a tuning of the agent."""

    name: Name
    score: Score
    area: Score
    evaluations: Count
    is_whole: bool
    since: Count = 0
    known: Share | None = None
    settings: dict[str, Any]


class TuningFile(Content):
    """result.json of a tuning of the agent."""

    name: Name
    objective: Literal["score", "area"]
    metric: MetricEntry | None = None
    task: Name | None = None
    start: dict[str, Any]
    trials: Annotated[list[TrialRow], Field(min_length=1)]
    answers: dict[str, Count]
    seconds: dict[str, Seconds]
