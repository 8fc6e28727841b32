"""Descents: methods that cut the whole network step by step, through every rate.

One descent serves all rates: the network gets smaller until it meets the largest rate, whose budget
is then spent exactly, and continues from there to the next one. The size of a round follows from
the number of evaluations, so that the smallest rate is reached with all of them used.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass

import numpy as np

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import FAILED, Candidate, Measurement
from cacp_ray.searching.budget import Budget, Floats, Ints, grow
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps

# Cuts the network to a share of the cost: yields candidates, returns the keep counts (G,) chosen.
Round = Generator[list[Candidate], list[Measurement], Ints]


@dataclass(frozen=True)
class Target:
    """Where a round of a descent ends."""

    cost_kept: float
    rate: float  # delivered at the target; 1 between rates

    @property
    def is_rate(self) -> bool:
        """Whether a rate is delivered here, with its budget spent."""
        return self.rate == self.cost_kept

    def propose(self, budget: Budget, counts: Ints) -> Candidate:
        """The candidate of keep counts (G,); at a rate its budget is spent."""
        if self.is_rate:
            row = counts[None]
            counts = grow(budget, row, row.astype(np.float64), budget.limit([self.rate]))[0]
        return Candidate(self.rate, tuple(counts.tolist()))


def plan_targets(rates: Floats, num_rounds: int) -> list[Target]:
    """`num_rounds` targets from 1 down through all rates, at least one a rate.

    Every round cuts about the same share of the rest.
    """
    rates = np.sort(rates)[::-1]
    starts = np.concatenate([[1.0], rates[:-1]])
    lengths = np.maximum(np.log(starts / rates), 1e-9)
    # Every rate takes one round; the others are spent where a round's cut is the largest.
    rounds = np.ones(len(rates), dtype=np.int64)
    for _ in range(num_rounds - len(rates)):
        rounds[np.argmax(lengths / rounds)] += 1
    targets: list[Target] = []
    for start, rate, number in zip(starts, rates, rounds, strict=True):
        between = start * (rate / start) ** (np.arange(1, number) / number)
        targets += [Target(float(kept), 1.0) for kept in between]
        targets.append(Target(float(rate), float(rate)))
    return targets


def make_descent(
    problem: Problem,
    name: str,
    per_round: int,
    cut: Callable[[Ints, Target], Round],
    before: int = 0,
) -> Procedure:
    """A strategy that cuts from the whole network through all rates.

    A round, which `cut` starts from keep counts (G,), has at most `per_round` candidates, and the
    first one `before` more.

    Raises:
        ConfigError: Too few evaluations for one round a rate.
    """
    num_rounds = (problem.evaluations - before) // max(1, per_round)
    if num_rounds < len(problem.rates):
        raise ConfigError(
            f"strategy {name} takes {per_round} evaluations a step and at least one step a rate: "
            f"raise evaluations to {per_round * len(problem.rates) + before}, or choose another"
        )

    def steps() -> Steps:
        counts = problem.budget.num_channels
        for target in plan_targets(np.array(problem.rates), num_rounds):
            counts = yield from cut(counts, target)

    return Procedure(name, steps)


def choose(budget: Budget, counts: Ints, target: Target, smaller: Sequence[Ints]) -> Round:
    """Measures the smaller keep counts that meet a target; the best of them are the next counts.

    Where none meets the target, all groups shrink together.
    """
    limit = budget.limit(target.cost_kept)
    fitting = [row for row in smaller if budget.cost(row) <= limit]
    if not fitting:
        fitting = [shrink(budget, counts, counts.astype(np.float64), target.cost_kept)]
    candidates = [target.propose(budget, row) for row in fitting]
    ranks = [_rank(measurement) for measurement in (yield candidates)]
    return np.array(candidates[ranks.index(max(ranks))].keep_counts)


def shrink(budget: Budget, counts: Ints, steps: Floats, kept: float) -> Ints:
    """(G,) counts minus the smallest common multiple of `steps` that fits a share of the cost.

    They still cost too much where the smallest legal ones do.
    """
    limit = budget.limit(kept)
    if budget.cost(counts) <= limit:
        return counts

    def less(multiple: float) -> Ints:
        return np.minimum(counts, budget.floor_to_legal(counts - multiple * steps))

    low, high = 0.0, float((counts / np.where(steps > 0, steps, np.inf)).max())
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if budget.cost(less(middle)) <= limit else (middle, high)
    return less(high)


def _rank(measurement: Measurement) -> tuple[float, float]:
    """Higher is better: accuracy, then the lower loss; failed measurements come last."""
    return measurement.rank if measurement.status == "ok" else (FAILED, 0.0)
