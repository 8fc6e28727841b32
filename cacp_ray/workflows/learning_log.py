"""What an agent learns while it searches, written down as it goes.

About every 40th of the evaluations `learning.jsonl` gets a line, and the loggers the same numbers:
rewards, losses, noise, and what the policy would answer now, at rates that are searched and at some
that are not. The answers cost nothing to name. Some of them are measured after the search, on a
part of the search split; the agent is never told.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Evaluator, Measurement
from cacp_ray.io.files import write_text
from cacp_ray.io.jsonl import append_line
from cacp_ray.io.rates import format_rate
from cacp_ray.reporting.learning import REWARD_WINDOW, Line
from cacp_ray.reporting.scalars import ScalarLog
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.rundir.schema import LEARNING_FILE, read_learning
from cacp_ray.searching.budget import Budget
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategy import Strategy
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import find_policy
from cacp_ray.workflows.winners import measure_candidates

NUM_LINES = 40  # in a whole search
NUM_MOMENTS = 8  # at which the policy's answers are measured
NUM_IMAGES = 1000  # in each of these measurements
NUM_UNSEEN = 3
LONE_STEP = 0.1  # to the unseen rates around a rate that has no neighbour


def unseen_rates(rates: Sequence[float], budget: Budget) -> list[float]:
    """Up to three reachable rates that are not searched, of two decimals, rising.

    Midpoints between neighbours, of the widest gaps first, then one rate half a gap further out:
    below the smallest where that is reachable, else above the largest.
    """
    known = sorted(rates)
    pairs = list(pairwise(known)) or [(known[0], known[0] + 2 * LONE_STEP)]
    below = known[0] - (pairs[0][1] - pairs[0][0]) / 2
    above = known[-1] + (pairs[-1][1] - pairs[-1][0]) / 2
    widest = sorted(pairwise(known), key=lambda pair: round(pair[0] - pair[1], 6))

    def usable(wanted: Sequence[float]) -> list[float]:
        rounded = [round(rate, 2) for rate in wanted]
        return [
            rate
            for rate in rounded
            if rate not in known and 0 < rate < 1 and budget.limit(rate) >= budget.smallest
        ]

    middles = usable([(low + high) / 2 for low, high in widest])
    return sorted([*middles, *usable([below, above])[:1]][:NUM_UNSEEN])


class LearningLog:
    """Writes `learning.jsonl`; continues what the run directory holds."""

    def __init__(
        self,
        run_dir: Path,
        strategy: Strategy,
        rates: Sequence[float],
        unseen: Sequence[float],
        evaluations: int,
        scalars: ScalarLog,
    ) -> None:
        """Reads the lines there are; a line that a kill cut short is dropped.

        Args:
            run_dir: Folder of the run.
            strategy: Its policy is asked at every line, once it has one.
            rates: The rates that are searched.
            unseen: Other rates that the policy is asked for.
            evaluations: Evaluations of the whole search.
            scalars: Gets the same numbers.
        """
        self._strategy, self._scalars = strategy, scalars
        self._rates = tuple(rates)
        self._shown = sorted({*rates, *unseen})
        self._total = evaluations
        self._path = run_dir / LEARNING_FILE
        self.lines = read_learning(run_dir)
        if self._path.exists():
            text = "".join(f"{_encode(line)}\n" for line in self.lines)
            write_text(self._path, text)
        self._figures: dict[str, list[float]] = {"critic_loss": [], "policy_value": []}
        self._updates: int | None = None

    def watch(
        self,
        evaluations: int,
        records: Sequence[EpisodeRecord],
        figures: Mapping[str, float],
        *,
        is_last: bool = False,
    ) -> None:
        """Takes note of a turn of the search, and writes a line where one is due."""
        for name, values in self._figures.items():
            value = float(figures.get(name, math.nan))
            if math.isfinite(value):
                values.append(value)
        if "updates" in figures:
            self._updates = int(figures["updates"])
        last = self.lines[-1]["evaluations"] if self.lines else 0
        if evaluations > last and (is_last or is_moment(last, evaluations, self._total)):
            self._write(self._describe(evaluations, records))

    def close(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Adds the measured answers of `measure_answers` to the loggers, and ends them."""
        for evaluations in sorted({point["evaluations"] for point in points}):
            self._scalars.write(
                {
                    f"policy_score/{format_rate(point['rate'])}": point["score"]
                    for point in points
                    if point["evaluations"] == evaluations
                },
                evaluations,
            )
        self._scalars.close()

    def _describe(self, evaluations: int, records: Sequence[EpisodeRecord]) -> Line:
        means = {
            name: np.mean(values) if values else None for name, values in self._figures.items()
        }
        noise, answers = {}, {}
        policy = find_policy(self._strategy)
        if policy is not None:
            noise = {rate: policy.noise(rate) for rate in self._rates}
            answers = dict(zip(self._shown, policy.policy(self._shown).tolist(), strict=True))
        for values in self._figures.values():
            values.clear()
        return {
            "evaluations": evaluations,
            **{name: _plain(mean) for name, mean in means.items()},
            "updates": self._updates,
            "noise": {_key(rate): _plain(noise.get(rate)) for rate in self._rates},
            "cached_share": _plain(np.mean([row.cached for row in records]) if records else None),
            "reward": {_key(rate): recent_reward(records, rate) for rate in self._rates},
            "policy": {_key(rate): answers.get(rate) for rate in self._shown},
        }

    def _write(self, line: Line) -> None:
        append_line(self._path, _encode(line))
        self.lines.append(line)
        scalars = {name: line[name] for name in ("critic_loss", "policy_value", "cached_share")}
        for name in ("reward", "noise"):
            scalars |= {f"{name}/{rate}": value for rate, value in line[name].items()}
        self._scalars.write(scalars, line["evaluations"])


def is_moment(before: int, evaluations: int, total: int) -> bool:
    """Whether one of the forty moments of a search lies between two numbers of evaluations."""
    return evaluations * NUM_LINES // total > before * NUM_LINES // total


def recent_reward(records: Sequence[EpisodeRecord], rate: float) -> float | None:
    """Mean top-1 of the rate's last candidates that were measured; None where there is none."""
    own = [row.score for row in records if row.rate == rate and row.status == "ok"]
    return _plain(np.mean(own[-REWARD_WINDOW:])) if own else None


def choose_moments(lines: Sequence[Line], count: int = NUM_MOMENTS) -> list[Line]:
    """Evenly spaced lines that have the policy's answers, the first and the last included."""
    known = [line for line in lines if all(line["policy"].values())]
    places = np.linspace(0, len(known) - 1, min(count, len(known)))
    return [known[round(place)] for place in places]


def measure_answers(
    lines: Sequence[Line],
    rates: Sequence[float],
    images: int,
    measure: Callable[[Sequence[Candidate]], Sequence[Measurement | None]],
) -> list[dict[str, Any]]:
    """Top-1 of the policy's recorded answers at a few moments of the search.

    Equal keep counts are measured once, on the first `images` images of the search split.
    """
    answers = [
        (line["evaluations"], float(key), tuple(counts))
        for line in choose_moments(lines)
        for key, counts in line["policy"].items()
    ]
    candidates: dict[tuple[int, ...], Candidate] = {}
    for _, rate, counts in answers:
        candidates.setdefault(counts, Candidate(rate, counts, images=images))
    measurements = dict(zip(candidates, measure(list(candidates.values())), strict=True))
    points: list[dict[str, Any]] = []
    for evaluations, rate, counts in answers:
        measurement = measurements[counts]
        if measurement is None:
            continue
        points.append(
            {
                "evaluations": evaluations,
                "rate": rate,
                "seen": rate in rates,
                "score": _plain(measurement.score),
                "images": measurement.images,
            }
        )
    return points


def measure_learning(log: LearningLog, setup: Setup, evaluator: Evaluator) -> dict[str, Any]:
    """What result.json says of the agent's learning, in addition to learning.jsonl."""
    images = min(NUM_IMAGES, setup.num_images)
    points = measure_answers(
        log.lines, setup.config.rates, images, partial(measure_candidates, evaluator)
    )
    log.close(points)
    return {"images": images, "policy_score": points}


def log_best(scalars: ScalarLog, loop: SearchLoop, shown: int) -> int:
    """Logs the best of every rate at about forty moments; returns the evaluations of the last."""
    progress = loop.progress
    if not (loop.done or is_moment(shown, progress.evaluations, progress.total)):
        return shown
    scalars.write(
        {
            f"best_score/{format_rate(rate)}": None if best is None else best.score
            for rate, best in progress.best.items()
        }
        | {"evaluations_per_second": progress.evaluations_per_second},
        progress.evaluations,
    )
    return progress.evaluations


def _key(rate: float) -> str:
    return format_rate(rate)


def _plain(value: Any) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _encode(line: Line) -> str:
    return json.dumps(line, allow_nan=False)
