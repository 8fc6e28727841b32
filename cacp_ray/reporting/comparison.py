"""The numbers of a comparison of runs, behind its table, figure and JSON file."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from cacp_ray.evaluation.measurement import Metric
from cacp_ray.io.rates import format_rate

UNFINISHED = "(unfinished)"

Point = tuple[float, float]  # cost kept, a share, and score
ByRate = dict[float, float | None]


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison; scores are those of its candidates."""

    label: str  # strategy, with the folder where several runs have the same one
    path: str
    strategy: str
    is_finished: bool  # if not, all numbers are those so far
    searched: Literal["together", "separately"]  # one search for all rates, or one for each
    evaluations: int  # distinct candidates so far
    asked: int  # distinct candidates that the configuration grants
    known: int  # how many of `evaluations` a measurement of another run answered
    seconds: float | None  # duration of the search phase; None where it has not ended
    search_score: ByRate  # best candidate within the budget of each rate, before fine-tuning
    policy_score: ByRate  # the trained policy's own answers; empty where there are none
    winners: dict[float, Point]  # of `search_score`
    policy_points: dict[float, Point]  # of `policy_score`
    frontier: tuple[Point, ...]  # best measured at each cost or below; both coordinates rise


@dataclass(frozen=True)
class Comparison:
    """Runs on the same network, data, cost, order, recovery and evaluation settings."""

    cost: str  # what a rate limits
    metric: Metric  # what scores measure
    base_score: float  # of the whole network on the whole search split
    base_images: int  # images of the whole search split
    images: int  # images that scored each candidate
    runs: tuple[ComparedRun, ...]  # in the order given

    @property
    def rates(self) -> tuple[float, ...]:
        """Rates of all runs together, the smallest first."""
        return tuple(sorted({rate for run in self.runs for rate in run.search_score}))

    @property
    def common_rates(self) -> tuple[float, ...]:
        """Rates that every run has; means can be compared only over these."""
        return tuple(r for r in self.rates if all(r in run.search_score for run in self.runs))

    def mean(self, score: ByRate) -> float | None:
        """Mean over the common rates; None where a value is missing."""
        values = [score.get(rate) for rate in self.common_rates]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known and len(known) == len(values) else None

    @property
    def standard_errors(self) -> dict[float, float]:
        """Binomial standard error of the difference of two runs at each rate.

        The error holds for two runs on different images, both as accurate as the mean of the runs.
        On the same images it is smaller, but a record does not say which images were right.
        """
        errors: dict[float, float] = {}
        for rate in self.rates if self.images and self.metric.is_share else ():
            values = [run.search_score.get(rate) for run in self.runs]
            known = [value for value in values if value is not None]
            if known:
                mean = sum(known) / len(known)
                errors[rate] = math.sqrt(2 * mean * (1 - mean) / self.images)
        return errors

    def as_json(self) -> dict[str, Any]:
        """All numbers of table and figure for a JSON file; rates are texts such as 0.30."""
        runs = []
        for run in self.runs:
            values = dataclasses.asdict(run)
            for key in ("search_score", "policy_score", "winners", "policy_points"):
                values[key] = {format_rate(rate): value for rate, value in values[key].items()}
            values["mean_search_score"] = self.mean(run.search_score)
            values["mean_policy_score"] = self.mean(run.policy_score)
            runs.append(values)
        return {
            "cost": self.cost,
            "metric": vars(self.metric),
            "base_score": self.base_score,
            "base_images": self.base_images,
            "images": self.images,
            "rates": list(self.rates),
            "mean_over": list(self.common_rates),
            "standard_errors": {format_rate(r): error for r, error in self.standard_errors.items()},
            "runs": runs,
        }
