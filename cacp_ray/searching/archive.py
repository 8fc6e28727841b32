"""The best measurement for every rate, asked for or not."""

import bisect
import math

from cacp_ray.rundir.records import EpisodeRecord

Rank = tuple[float, float, int, int]


class Archive:
    """Keeps the frontier: measurements that no cheaper or equally costly one beats.

    A higher score is better, then a lower loss, then a lower cost, then the earlier index, so the
    content does not depend on the order in which measurements arrive. A measurement serves every
    rate whose budget it fits, whatever rate it was proposed for. Failed ones never enter.
    """

    def __init__(self, total: int) -> None:
        self._total = total  # cost of the whole network, in the unit that the rates limit
        self.lowest: float | None = None  # score of the poorest measurement; None before the first
        # Three parallel lists; costs and ranks both rise strictly.
        self._costs: list[int] = []
        self._ranks: list[Rank] = []
        self._records: list[EpisodeRecord] = []

    def add(self, record: EpisodeRecord) -> None:
        """Adds one measurement; a policy's answer after the search is none of the search's."""
        if record.status != "ok" or record.is_answer:
            return
        self.lowest = record.score if self.lowest is None else min(self.lowest, record.score)
        cost = round(record.cost_kept * self._total)
        rank = (*record.rank, -cost, -record.index)
        end = bisect.bisect_right(self._costs, cost)
        if end and self._ranks[end - 1] >= rank:
            return
        start = bisect.bisect_left(self._costs, cost)
        end = max(end, bisect.bisect_right(self._ranks, rank))
        self._costs[start:end] = [cost]
        self._ranks[start:end] = [rank]
        self._records[start:end] = [record]

    def best(self, rate: float) -> EpisodeRecord | None:
        """The best measurement within the budget of `rate`, None where there is none yet."""
        fitting = bisect.bisect_right(self._costs, math.floor(rate * self._total))
        return self._records[fitting - 1] if fitting else None

    @property
    def frontier(self) -> tuple[EpisodeRecord, ...]:
        """Measurements with a higher score than every cheaper one, by rising cost."""
        frontier: list[EpisodeRecord] = []
        for record in self._records:
            if not frontier or record.score > frontier[-1].score:
                frontier.append(record)
        return tuple(frontier)
