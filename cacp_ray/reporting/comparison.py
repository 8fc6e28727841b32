"""What a comparison of several runs says: the numbers behind its table, figure and JSON file."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

UNFINISHED = "(unfinished)"

Point = tuple[float, float]  # cost kept and top-1, both shares
ByRate = dict[float, float | None]


@dataclass(frozen=True)
class ComparedRun:
    """What a comparison says of one run; accuracies are shares on the search split, as scored.

    Attributes:
        label: Strategy; with the folder where runs share one.
        path: Of the run.
        strategy: Its name.
        is_finished: Whether the search has ended; if not, all figures are those so far.
        searched: Whether one search served all rates, or each rate had its own.
        evaluations: Distinct candidates so far.
        asked: Distinct candidates that the configuration grants.
        known: Of `evaluations`, those that a measurement of another run answered.
        seconds: Of the search phase; None where it has not ended.
        search_top1: By rate, the best candidate within the budget, before fine-tuning.
        policy_top1: By rate, what the trained policy itself answers; empty where there is none.
        winners: By rate, where `search_top1` lies.
        policy_points: By rate, where `policy_top1` lies.
        frontier: The best measured at each cost or below; both coordinates rise.
    """

    label: str
    path: str
    strategy: str
    is_finished: bool
    searched: Literal["together", "separately"]
    evaluations: int
    asked: int
    known: int
    seconds: float | None
    search_top1: ByRate
    policy_top1: ByRate
    winners: dict[float, Point]
    policy_points: dict[float, Point]
    frontier: tuple[Point, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs on the same network, data, cost, order, recovery and evaluation settings.

    Attributes:
        cost: What a rate limits.
        base_top1: Of the whole network on the whole search split.
        base_images: Of the whole search split.
        images: That scored each candidate.
        runs: In the order given.
    """

    cost: str
    base_top1: float
    base_images: int
    images: int
    runs: tuple[ComparedRun, ...]

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates of any run, the smallest first."""
        return tuple(sorted({rate for run in self.runs for rate in run.search_top1}))

    @property
    def common_rates(self) -> tuple[float, ...]:
        """Rates of every run: only over these can means be compared."""
        return tuple(r for r in self.rates if all(r in run.search_top1 for run in self.runs))

    def mean(self, top1: ByRate) -> float | None:
        """Over the rates of every run; None where a figure is missing."""
        values = [top1.get(rate) for rate in self.common_rates]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    @property
    def standard_errors(self) -> dict[float, float]:
        """By rate, the binomial standard error of the difference of two runs.

        As if each run had been scored on images of its own, both as accurate as the mean of the
        runs. On the same images it is smaller, but a record does not say which images were right.
        """
        errors = {}
        for rate in self.rates if self.images else ():
            values = [run.search_top1.get(rate) for run in self.runs]
            known = [value for value in values if value is not None]
            if known:
                mean = sum(known) / len(known)
                errors[rate] = math.sqrt(2 * mean * (1 - mean) / self.images)
        return errors

    def as_json(self) -> dict[str, Any]:
        """All figures of the table and of the figure; rates are texts such as 0.30."""
        runs = []
        for run in self.runs:
            values = dataclasses.asdict(run)
            for key in ("search_top1", "policy_top1", "winners", "policy_points"):
                values[key] = {f"{rate:.2f}": value for rate, value in values[key].items()}
            values["mean_search_top1"] = self.mean(run.search_top1)
            values["mean_policy_top1"] = self.mean(run.policy_top1)
            runs.append(values)
        return {
            "cost": self.cost,
            "base_top1": self.base_top1,
            "base_images": self.base_images,
            "images": self.images,
            "rates": list(self.rates),
            "mean_over": list(self.common_rates),
            "standard_errors": {f"{r:.2f}": error for r, error in self.standard_errors.items()},
            "runs": runs,
        }
