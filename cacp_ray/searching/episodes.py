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
        """Remembers what the run directory holds."""
        self._run.compact()
        rows = self._run.read_records()
        for row in rows:
            self._remember(row)
        return rows

    def knows(self, candidate: Candidate, *, whole: bool = False) -> bool:
        """Whether there is a measurement of the candidate's keep counts and criterion.

        Args:
            candidate: What is asked.
            whole: Whether it has to be a success on all images that the candidate names.
        """
        row = self._by_key.get(candidate.key)
        if row is None or not whole:
            return row is not None
        return row.status == "ok" and row.images >= (candidate.images or 0)

    def record(
        self, candidate: Candidate, measurement: Measurement, *, is_answer: bool = False
    ) -> EpisodeRecord:
        """Records the measurement of a candidate."""
        row = make_record(
            candidate,
            measurement,
            self._cost_model,
            cost=self._cost_name,
            strategy=self.strategy,
            is_answer=is_answer,
        )
        return self._append(row)

    def repeat(self, candidate: Candidate, *, is_answer: bool = False) -> EpisodeRecord:
        """Records the known measurement of a candidate as an answer from memory."""
        own = {"index": candidate.index, "rate": candidate.rate, "strategy": self.strategy}
        own |= {"cached": True, "seconds": 0.0, "finished_at": time.time()}
        known = self._by_key[candidate.key]
        return self._append(dataclasses.replace(known, is_answer=is_answer, **own))

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

    def _append(self, row: EpisodeRecord) -> EpisodeRecord:
        self._run.append(row)
        self._remember(row)
        return row

    def _remember(self, row: EpisodeRecord) -> None:
        self.rows.append(row)
        self.archive.add(row)
        if row.status == "ok" or row.key not in self._by_key:
            self._by_key[row.key] = row
