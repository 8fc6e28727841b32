"""What a search has measured: recorded on disk, remembered by subnet, the best of every rate."""

import dataclasses
import math
import time

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, Subnet
from cacp_ray.pruning.cost import CostModel, Limited
from cacp_ray.searching.archive import Archive
from cacp_ray.searching.records import EpisodeRecord, as_result, make_record
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.strategy import Proposal


class Episodes:
    """The measurements of a run.

    Attributes:
        archive: The best of every rate.
        strategy: Name of the strategy, for the records.
    """

    def __init__(self, run: RunDirectory, cost_model: CostModel, cost: Limited) -> None:
        """Reads nothing yet.

        Args:
            run: Where they are kept.
            cost_model: Of the whole network.
            cost: What a rate limits, as `CostModel.kind` takes it.
        """
        self._run, self._cost_model, self._cost_name = run, cost_model, cost
        self._cost = cost_model.kind(cost)
        self._total = int(self._cost(cost_model.num_channels))
        self._memory: dict[Subnet, Measurement] = {}
        self.archive = Archive(self._total)
        self.strategy = ""

    def __len__(self) -> int:
        """Distinct candidates."""
        return len(self._memory)

    def read(self) -> list[EpisodeRecord]:
        """What the run directory holds; known from now on."""
        self._run.compact()
        rows = self._run.read_records()
        for row in rows:
            self._remember(row)
        return rows

    def find(self, subnet: Subnet) -> Measurement | None:
        """Of a subnet that was measured before."""
        return self._memory.get(subnet)

    def record(
        self, candidate: Candidate, measurement: Measurement, *, is_cached: bool
    ) -> Measurement:
        """Keeps a measurement, as that of this candidate; `is_cached`: it was not made for it."""
        own = dataclasses.replace(
            measurement,
            index=candidate.index,
            seconds=0.0 if is_cached else measurement.seconds,
            finished_at=time.time() if is_cached else measurement.finished_at,
        )
        row = make_record(
            candidate,
            own,
            self._cost_model,
            cost=self._cost_name,
            strategy=self.strategy,
            cached=is_cached,
        )
        self._run.append(row)
        self._remember(row)
        return own

    def check_budget(self, proposal: Proposal) -> None:
        """Refuses what costs more than its rate allows.

        Raises:
            EvaluationError: It does.
        """
        cost = int(self._cost(proposal.keep_counts))
        limit = math.floor(proposal.rate * self._total)
        if cost > limit:
            raise EvaluationError(
                f"strategy {self.strategy}: keep counts for rate {proposal.rate} cost {cost},"
                f" above the budget of {limit}; let it round with cacp_ray.searching.budget.spend"
            )

    def _remember(self, row: EpisodeRecord) -> None:
        self.archive.add(row)
        self._memory.setdefault(row.subnet, as_result(row)[1])
