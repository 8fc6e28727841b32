"""A candidate and its measurement as one row of the episodes, and back."""

# pyarrow has no complete types:
# pyright: basic

import dataclasses
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cacp_ray.evaluation.measurement import Candidate, Measurement, Status, Subnet
from cacp_ray.pruning.cost import CostModel, Limited

SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("strategy", pa.string()),
        ("rate", pa.float64()),
        ("keep_counts", pa.list_(pa.int64())),
        ("macs", pa.int64()),
        ("params", pa.int64()),
        ("cost_kept", pa.float64()),
        ("top1", pa.float64()),
        ("top5", pa.float64()),
        ("loss", pa.float64()),
        ("images", pa.int64()),
        ("reward", pa.float64()),
        ("seconds", pa.float64()),
        ("cached", pa.bool_()),
        ("status", pa.string()),
        ("evaluator", pa.string()),
        ("node", pa.string()),
        ("attempt", pa.int64()),
        ("finished_at", pa.float64()),
        ("error", pa.string()),
        ("order", pa.string()),
        ("hits", pa.string()),
    ]
)
MEASUREMENT_FIELDS = tuple(field.name for field in dataclasses.fields(Measurement))


@dataclass(frozen=True)
class EpisodeRecord:
    """One row of `episodes/`: a candidate and its measurement.

    Attributes:
        index: Of the candidate, unique in the run.
        strategy: Name of the strategy that proposed it.
        rate: The rate it was proposed for.
        keep_counts: Channels kept, one entry a group.
        macs: For one input.
        params: Number of parameters.
        cost_kept: Share of the whole network's cost, in (0, 1].
        top1: Share of images in [0, 1].
        top5: Share of images in [0, 1].
        loss: Mean cross-entropy in nats.
        images: Images scored.
        reward: What the strategy maximises.
        seconds: Spent scoring; 0 where it was answered from memory.
        cached: Whether it was answered from memory.
        status: `ok`, `failed` or `stopped`.
        evaluator: Name of the actor.
        node: Address of its machine.
        attempt: 1 for the first try.
        finished_at: Unix time.
        error: Reason of a failure, one line; or what was out of the ordinary in a success.
        order: Criterion of its importance order; empty for the run's.
        hits: Which images were right (`cacp_ray.evaluation.racing`); empty where not all were
            scored.
    """

    index: int
    strategy: str
    rate: float
    keep_counts: tuple[int, ...]
    macs: int
    params: int
    cost_kept: float
    top1: float
    top5: float
    loss: float
    images: int
    reward: float
    seconds: float
    cached: bool
    status: Status
    evaluator: str
    node: str
    attempt: int
    finished_at: float
    error: str
    order: str = ""
    hits: str = ""

    @property
    def subnet(self) -> Subnet:
        """What tells candidates apart."""
        return self.keep_counts, self.order


def make_record(
    candidate: Candidate,
    found: Measurement,
    cost_model: CostModel,
    *,
    cost: Limited,
    strategy: str,
    cached: bool = False,
) -> EpisodeRecord:
    """The row of a measurement.

    Args:
        candidate: Whose measurement it is.
        found: The measurement.
        cost_model: Of the whole network.
        cost: What a rate limits, as `CostModel.kind` takes it.
        strategy: Name of what proposed the candidate.
        cached: Whether it was answered from memory.
    """
    counts, limited = candidate.keep_counts, cost_model.kind(cost)
    return EpisodeRecord(
        **dataclasses.asdict(found),
        strategy=strategy,
        rate=candidate.rate,
        keep_counts=counts,
        order=candidate.order,
        macs=int(cost_model.macs(counts)),
        params=int(cost_model.params(counts)),
        cost_kept=int(limited(counts)) / int(limited(cost_model.num_channels)),
        reward=found.top1,
        cached=cached,
    )


def as_result(row: EpisodeRecord) -> tuple[Candidate, Measurement]:
    """The candidate and the measurement of a row."""
    values = {name: getattr(row, name) for name in MEASUREMENT_FIELDS}
    candidate = Candidate(row.index, row.rate, row.keep_counts, order=row.order)
    return candidate, Measurement(**values)


def read_record(row: dict[str, Any]) -> EpisodeRecord:
    """Of a line of the journal or of `episodes/`."""
    values = dict(row)
    values["keep_counts"] = tuple(row["keep_counts"])
    return EpisodeRecord(**values)
