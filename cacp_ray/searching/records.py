"""A candidate and its measurement as one row of the episodes, and back."""

import dataclasses

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.pruning.cost import CostModel, Limited
from cacp_ray.searching.run_directory import EpisodeRecord

MEASUREMENT_FIELDS = tuple(field.name for field in dataclasses.fields(Measurement))


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
