"""Rows of the episodes: a measurement, its candidate, and what the run adds."""

# pyarrow has no complete types:
# pyright: basic

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from cacp_ray.evaluation.measurement import Candidate, Measurement, SubnetKey
from cacp_ray.pruning.cost import CostModel, Limited

# Figures with columns of their own: those of the built-in task.
COLUMNS = ("top1", "top5", "loss")
ARROW_TYPES = {
    Mapping[str, float]: pa.map_(pa.string(), pa.float64()),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
    str: pa.string(),
    tuple[int, ...]: pa.list_(pa.int64()),
}


@dataclass(frozen=True, kw_only=True)
class EpisodeRecord(Measurement):
    """A measurement with its candidate, as `episodes/` holds it.

    Attributes:
        strategy: Name of the strategy that proposed the candidate.
        rate: Compression rate of the candidate.
        keep_counts: Channels kept, one entry for each group.
        criterion: Criterion of its importance order; empty for the run's.
        macs: Multiply-accumulates for one input.
        params: Number of parameters.
        cost_kept: Share of the whole network's cost, in (0, 1].
        reward: What the strategy maximises.
        is_answer: Whether it measures what the policy answered after the search.
    """

    strategy: str
    rate: float
    keep_counts: tuple[int, ...]
    criterion: str = ""
    macs: int
    params: int
    cost_kept: float
    reward: float
    is_answer: bool = False

    @property
    def key(self) -> SubnetKey:
        """Keep counts and criterion, which tell candidates apart."""
        return self.keep_counts, self.criterion

    @property
    def candidate(self) -> Candidate:
        """The candidate that was measured."""
        return Candidate(self.rate, self.keep_counts, self.criterion, self.index)


def _arrow_type(annotation: Any) -> pa.DataType:
    is_choice = typing.get_origin(annotation) is typing.Literal
    return ARROW_TYPES[str if is_choice else annotation]


def _make_schema() -> pa.Schema:
    hints = typing.get_type_hints(EpisodeRecord)
    names = sorted(hints, key=lambda name: name != "index")  # the index first
    own = [(name, _arrow_type(hints[name])) for name in names]
    return pa.schema([*own, *((name, pa.float64()) for name in COLUMNS)])


SCHEMA = _make_schema()


def make_record(
    candidate: Candidate,
    measurement: Measurement,
    cost_model: CostModel,
    *,
    cost: Limited,
    strategy: str,
    is_answer: bool = False,
) -> EpisodeRecord:
    """The row of a measurement; a rate limits `cost`, as `CostModel.kind` takes it."""
    counts, limited = candidate.keep_counts, cost_model.kind(cost)
    return EpisodeRecord(
        **dataclasses.asdict(measurement),
        strategy=strategy,
        rate=candidate.rate,
        keep_counts=counts,
        criterion=candidate.criterion,
        macs=int(cost_model.macs(counts)),
        params=int(cost_model.params(counts)),
        cost_kept=int(limited(counts)) / int(limited(cost_model.num_channels)),
        reward=measurement.score,
        is_answer=is_answer,
    )


def as_row(record: EpisodeRecord) -> dict[str, Any]:
    """A line of the journal and a row of `episodes/`; `read_record` reads both."""
    figures = dict(record.figures)
    own = {name: figures.pop(name, None) for name in COLUMNS}
    return {**dataclasses.asdict(record), "figures": figures, **own}


def read_record(row: dict[str, Any]) -> EpisodeRecord:
    """The record in a line of the journal or a row of `episodes/`.

    Raises:
        KeyError, TypeError, ValueError: The row has other columns.
    """
    values = dict(row)
    own = {name: value for name in COLUMNS if (value := values.pop(name)) is not None}
    figures = {**dict(values["figures"]), **own}
    return EpisodeRecord(
        **{**values, "figures": figures, "keep_counts": tuple(values["keep_counts"])}
    )
