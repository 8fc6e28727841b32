"""What a search has measured: recorded on disk, remembered by key, the best of every rate."""

import dataclasses
import math
import time
from collections.abc import Sequence

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.measurement import Candidate, Measurement, SubnetKey
from cacp_ray.pruning.cost import CostModel, Limited
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord, make_record
from cacp_ray.searching.archive import Archive


class Episodes:
    """The measurements of a run; `read` takes those that its directory holds."""

    def __init__(self, run: RunDirectory, cost_model: CostModel, cost: Limited) -> None:
        self._run, self._cost_model, self._cost_name = run, cost_model, cost
        self._cost = cost_model.kind(cost)
        self._total = int(self._cost(cost_model.num_channels))
        self._by_key: dict[SubnetKey, EpisodeRecord] = {}
        self.rows: list[EpisodeRecord] = []  # in the order recorded
        self.archive = Archive(self._total)
        self.strategy = ""  # name of the strategy, for the records

    def __len__(self) -> int:
        """Distinct candidates."""
        return len(self._by_key)

    def read(self) -> Sequence[EpisodeRecord]:
        """Remembers what the run directory holds; the archive is left to `archive.add`."""
        self._run.compact()
        self.rows = self._run.read_records()
        for row in self.rows:
            self._by_key.setdefault(row.key, row)
        return tuple(self.rows)

    def is_known(self, candidate: Candidate) -> bool:
        """Whether a candidate with these keep counts and this criterion has a measurement."""
        return candidate.key in self._by_key

    def record(
        self, candidate: Candidate, measurement: Measurement, *, archived: bool = True
    ) -> EpisodeRecord:
        """Records the measurement of a candidate; `archived` lets it compete in the archive."""
        row = make_record(
            candidate, measurement, self._cost_model, cost=self._cost_name, strategy=self.strategy
        )
        return self._append(row, archived)

    def repeat(self, candidate: Candidate, *, archived: bool = True) -> EpisodeRecord:
        """Records the known measurement of a candidate as an answer from memory."""
        known = self._by_key[candidate.key]
        own = {"index": candidate.index, "rate": candidate.rate, "strategy": self.strategy}
        row = dataclasses.replace(known, cached=True, seconds=0.0, finished_at=time.time(), **own)
        return self._append(row, archived)

    def check_budget(self, candidate: Candidate) -> None:
        """Refuses what costs more than its rate allows.

        Raises:
            EvaluationError: The candidate is above its budget.
        """
        cost = int(self._cost(candidate.keep_counts))
        limit = math.floor(candidate.rate * self._total)
        if cost > limit:
            raise EvaluationError(
                f"strategy {self.strategy}: keep counts for rate {candidate.rate} cost {cost},"
                f" above the budget of {limit}; let it round with cacp_ray.searching.budget.spend"
            )

    def _append(self, row: EpisodeRecord, archived: bool) -> EpisodeRecord:
        self._run.append(row)
        self.rows.append(row)
        self._by_key.setdefault(row.key, row)
        if archived:
            self.archive.add(row)
        return row
