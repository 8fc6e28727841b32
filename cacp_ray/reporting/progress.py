"""Where the long work stands: what the search, fine-tuning and agent tuning tell their displays."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cacp_ray.evaluation.measurement import TOP1, Metric
from cacp_ray.rundir.records import EpisodeRecord


@dataclass(frozen=True)
class SearchProgress:
    """State of a search; `evaluations` and `total` count distinct candidates."""

    evaluations: int  # earlier sessions included
    total: int
    best: Mapping[float, EpisodeRecord | None]  # within the budget of each rate
    evaluations_per_second: float  # of this process over the last minute
    num_alive: int  # evaluators ready to score
    seconds_left: float | None  # None before the first measurement of this process
    metric: Metric = TOP1  # what scores measure


@dataclass(frozen=True)
class FinetuneProgress:
    """One finished epoch of one fine-tuning trial."""

    rate: float
    variant: str  # of the recipe; empty where there is only one
    epoch: int  # finished epochs, in [1, epochs]
    epochs: int
    train_loss: float  # mean over the epoch
    search_score: float  # share of the search split in [0, 1]
    seconds: float  # duration of this epoch
    is_restored: bool = False  # whether this repeats the last epoch before an interruption


@dataclass(frozen=True)
class TrialProgress:
    """State of an agent-tuning trial; `score` and `area` are means over rates and seeds."""

    name: str
    settings: Mapping[str, Any]  # values that the trial tries, by key path of the configuration
    evaluations: int  # in each of its searches
    score: float  # best so far
    area: float  # mean of `score` over the evaluations so far
    is_whole: bool  # whether its searches have reached their end; False where Tune stopped it
    since: int = 0  # evaluations when it got these settings; above 0 only in a population
    metric: Metric = TOP1  # what scores measure
