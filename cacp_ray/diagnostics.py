"""What an agent learns while it searches, written down as it goes.

About every 40th of the evaluations `learning.jsonl` gets a line, and the loggers the same numbers:
rewards, losses, noise, and what the policy would answer now, at rates that are searched and at some
that are not. The answers cost nothing to name. Some of them are measured after the search, on a
part of the search split; the agent is never told.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import write_file
from cacp_ray.reporting.learning import LEARNING_FILE, REWARD_WINDOW, Line, read_learning
from cacp_ray.reporting.scalars import ScalarLog
from cacp_ray.searching.budget import Budget
from cacp_ray.searching.records import EpisodeRecord
from cacp_ray.searching.run_directory import RunDirectory

NUM_LINES = 40  # of a whole search
NUM_MOMENTS = 8  # whose answers are measured
NUM_IMAGES = 1000  # that measure them
NUM_UNSEEN = 3
LONE_STEP = 0.1  # beyond a rate that has no neighbour


class Agent(Protocol):
    """What is asked of an agent."""

    @property
    def is_attached(self) -> bool:
        """Whether it has a problem, so that the rest may be called."""
        ...

    def noise(self, rate: float) -> float:
        """Standard deviation of its action noise."""
        ...

    def policy(self, rates: ArrayLike) -> Any:
        """(B, G) greedy keep counts."""
        ...


def unseen_rates(rates: Sequence[float], budget: Budget) -> list[float]:
    """Up to three reachable rates that are not searched, of two decimals, rising.

    Midpoints between neighbours, of the widest gaps first, then one rate half a gap further out:
    below the smallest where that is reachable, else above the largest.

    Args:
        rates: Those searched.
        budget: Says what is reachable.
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
        run: RunDirectory,
        agent: Agent,
        rates: Sequence[float],
        unseen: Sequence[float],
        evaluations: int,
        scalars: ScalarLog,
    ) -> None:
        """Reads the lines there are; a line that a kill cut short is dropped.

        Args:
            run: Where its files and the measurements are.
            agent: That is asked at every line.
            rates: Those searched.
            unseen: Others that the policy is asked for.
            evaluations: Of the whole search.
            scalars: Gets the same numbers.
        """
        self._run, self._agent, self._scalars = run, agent, scalars
        self._rates = tuple(rates)
        self._shown = sorted({*rates, *unseen})
        self._total = evaluations
        self._path = run.path / LEARNING_FILE
        self.lines = read_learning(self._path)
        if self.lines:
            text = "".join(map(_encode, self.lines))
            write_file(self._path, lambda temporary: temporary.write_text(text))
        self._turns: dict[str, list[float]] = {"critic_loss": [], "policy_value": []}
        self._updates: int | None = None

    def watch(self, evaluations: int, turn: Mapping[str, Any], *, is_last: bool = False) -> None:
        """Takes note of a turn of the search, and writes a line where one is due.

        Args:
            evaluations: Measured so far, earlier sessions included.
            turn: What the agent's `train` returned; empty where it has not learned.
            is_last: Whether the search has ended, which is worth a line.
        """
        self._note(turn)
        last = self.lines[-1]["evaluations"] if self.lines else 0
        if evaluations > last and (is_last or is_moment(last, evaluations, self._total)):
            self._write(self._describe(evaluations))

    def close(self, points: Sequence[Mapping[str, Any]]) -> None:
        """Adds the measured answers of `measure_answers` to the loggers, and ends them."""
        for evaluations in sorted({point["evaluations"] for point in points}):
            self._scalars.write(
                {
                    f"policy_top1/{point['rate']:.2f}": point["top1"]
                    for point in points
                    if point["evaluations"] == evaluations
                },
                evaluations,
            )
        self._scalars.close()

    def _note(self, turn: Mapping[str, Any]) -> None:
        learned = turn.get("learners", {}).get("default_policy", {})
        for name, values in self._turns.items():
            value = float(learned.get(name, math.nan))
            if math.isfinite(value):  # RLlib gives nan for a turn without gradient steps
                values.append(value)
        if "updates" in turn:
            self._updates = int(turn["updates"])

    def _describe(self, evaluations: int) -> Line:
        # Some milliseconds for a thousand rows, at forty moments: no need to keep count meanwhile.
        records = self._run.read_records()
        means = {name: np.mean(values) if values else None for name, values in self._turns.items()}
        noise, policy = {}, {}
        if self._agent.is_attached:
            noise = {rate: self._agent.noise(rate) for rate in self._rates}
            policy = dict(zip(self._shown, self._agent.policy(self._shown).tolist(), strict=True))
        for values in self._turns.values():
            values.clear()
        return {
            "evaluations": evaluations,
            **{name: _plain(mean) for name, mean in means.items()},
            "updates": self._updates,
            "noise": {_key(rate): _plain(noise.get(rate)) for rate in self._rates},
            "cached_share": _plain(np.mean([row.cached for row in records]) if records else None),
            "reward": {_key(rate): recent_reward(records, rate) for rate in self._rates},
            "policy": {_key(rate): policy.get(rate) for rate in self._shown},
        }

    def _write(self, line: Line) -> None:
        with self._path.open("a") as file:
            file.write(_encode(line))
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
    own = [row.top1 for row in records if row.rate == rate and row.status == "ok"]
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
    measure: Callable[[Sequence[Candidate]], Mapping[int, Measurement]],
) -> list[dict[str, Any]]:
    """Top-1 of the policy's recorded answers at a few moments of the search.

    Args:
        lines: Of `learning.jsonl`.
        rates: Those searched.
        images: Length of the search-split prefix that measures them.
        measure: Candidates -> measurements by index, without those that failed; equal keep counts
            are measured once.
    """
    answers = [
        (line["evaluations"], float(key), tuple(counts))
        for line in choose_moments(lines)
        for key, counts in line["policy"].items()
    ]
    candidates: dict[tuple[int, ...], Candidate] = {}
    for _, rate, counts in answers:
        candidates.setdefault(counts, Candidate(len(candidates), rate, counts, images))
    found = measure(list(candidates.values()))
    points: list[dict[str, Any]] = []
    for evaluations, rate, counts in answers:
        measured = found.get(candidates[counts].index)
        if measured is None:
            continue
        points.append(
            {
                "evaluations": evaluations,
                "rate": rate,
                "seen": rate in rates,
                "top1": _plain(measured.top1),
                "images": measured.images,
            }
        )
    return points


def _key(rate: float) -> str:
    return f"{rate:.2f}"


def _plain(value: Any) -> float | None:
    return None if value is None else float(f"{value:.6g}")


def _encode(line: Line) -> str:
    return json.dumps(line, allow_nan=False) + "\n"
