"""CaP's structural search: group by group, the strongest cut whose accuracy is tolerated.

One pass goes through the groups in forward order. The accuracy that must remain falls linearly from
that of the whole network to a final one, and in every group bisection finds the smallest keep count
that still reaches it with all earlier cuts in place. The cost of a pass is known only at its end,
so an outer search moves the final accuracy of each rate until the cost is the rate's. The widths of
every pass are scaled to the budgets of the rates that it serves, and spent exactly: these
candidates are delivered.

Source: after "Pruning with Compensation" (arXiv 2108.13728, as in its authors' code): forward
order, bisection, linear tolerance; its criterion and its compensation are `cap` and `compensate`,
the defaults of a run. Ours: channel groups instead of layers, the outer search, which uses every
pass for all rates, and exact budgets.
"""

import logging
from collections.abc import Generator

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement, SubnetKey
from cacp_ray.io.rates import format_rate
from cacp_ray.searching.budget import Ints, scale_to_budget, spend, uniform
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps, together
from cacp_ray.searching.strategy import make_candidates

BISECTIONS = 4  # steps in one group, down to a sixteenth of its channels
TOLERANCE = 0.01  # share of the cost; a pass that ends so near to its rate is the last
MOST_PASSES = 12  # passes for a rate
CLOSEST = 0.001  # final accuracies nearer than this lead to the same pass
BEND = 0.25  # exponent of the cost kept that guesses the accuracy between distant passes

Pass = tuple[float, float]  # final accuracy and share of the cost kept

logger = logging.getLogger(__name__)


def make_cap(problem: Problem) -> Procedure:
    """The strategy: passes until every rate is met, or the evaluations are used up.

    The number of evaluations of a pass is not known before. Where they end before a rate has had a
    pass, the uniform allocation is its answer, and a warning names the rate.
    """
    return Procedure("cap", lambda: _within_evaluations(problem, _search(problem)))


def _within_evaluations(problem: Problem, steps: Steps) -> Steps:
    """Runs the steps while an evaluation is left for every rate that has no answer yet."""
    asked: set[SubnetKey] = set()
    unanswered = list(problem.rates)
    step = next(steps)
    while True:
        asked |= {candidate.key for candidate in step}
        still = [rate for rate in unanswered if all(rate != other.rate for other in step)]
        if unanswered and len(asked) + len(still) > problem.evaluations:
            break
        unanswered = still
        measurements = yield step
        try:
            step = steps.send(measurements)
        except StopIteration:
            return
    logger.warning(
        "strategy cap: %d evaluations end before a first pass for %s (kept): uniform allocations "
        "stand in; %d are enough",
        problem.evaluations,
        ", ".join(format_rate(rate) for rate in unanswered),
        1 + len(problem.rates) * (BISECTIONS * len(problem.prunable) + len(problem.rates)),
    )
    counts = uniform(problem.budget, unanswered, np.ones(len(problem.budget.num_channels)))
    yield make_candidates(unanswered, counts)


def _search(problem: Problem) -> Steps:
    whole = problem.budget.num_channels
    (before,) = yield [Candidate(1.0, tuple(whole.tolist()))]
    passes: list[Pass] = [(before.score, 1.0)]
    open_rates = list(problem.rates)
    for _ in range(MOST_PASSES):
        new: list[Pass] = []
        yield from together(
            [_serve(problem, rate, before.score, _guess(passes, rate), new) for rate in open_rates]
        )
        tried = {final for final, _ in passes}
        passes += new
        open_rates = [
            rate
            for rate in open_rates
            if min(abs(kept - rate) for _, kept in passes) > TOLERANCE
            and min(abs(_guess(passes, rate) - final) for final in tried) > CLOSEST
        ]


def _guess(passes: list[Pass], rate: float) -> float:
    """Final accuracy whose pass should end at a rate, between the passes around it.

    A pass that ends below the rate bounds it from below; where there is none, an accuracy of 0 and
    a cost of 0 are the bound.
    """
    finals, kept = (np.array(values) for values in zip(*sorted([(0.0, 0.0), *passes]), strict=True))
    # A lower tolerance should never cost more.
    bent = np.maximum.accumulate(kept) ** BEND
    above = int(np.argmax(bent >= rate**BEND))
    low, high = max(above - 1, 0), above
    share = (rate**BEND - bent[low]) / max(bent[high] - bent[low], 1e-9)
    # The guess keeps off both ends, as the curve may be far off between distant passes.
    return float(finals[low] + np.clip(share, 0.1, 0.9) * (finals[high] - finals[low]))


def _serve(problem: Problem, rate: float, first: float, final: float, passes: list[Pass]) -> Steps:
    """One pass for a rate, then its widths at the budgets of the rate and of all near its end."""
    budget = problem.budget
    counts = yield from one_pass(problem, first, final)
    kept = int(budget.cost(counts)) / budget.total
    passes.append((final, kept))
    served = [near for near in problem.rates if near == rate or abs(kept - near) <= TOLERANCE]
    ratios = np.tile(counts / budget.num_channels, (len(served), 1))
    exact = spend(budget, scale_to_budget(budget, ratios, served), served)
    yield make_candidates(served, exact)


def one_pass(
    problem: Problem, first: float, final: float
) -> Generator[list[Candidate], list[Measurement], Ints]:
    """Keep counts (G,) of one pass from accuracy `first` to `final`."""
    budget, counts = problem.budget, problem.budget.num_channels.copy()
    for number, group in enumerate(problem.prunable, start=1):
        least = first - number * (first - final) / len(problem.prunable)
        levels = np.arange(int(counts[group]) // budget.round_to + 2)
        legal = np.unique(np.maximum(budget.count(levels, group), budget.min_counts[group]))
        too_few, enough = -1, len(legal) - 1
        for _ in range(BISECTIONS):
            if enough - too_few <= 1:
                break
            middle = (too_few + enough) // 2
            counts[group] = legal[middle]
            (measurement,) = yield [Candidate(1.0, tuple(counts.tolist()))]
            if measurement.status == "ok" and measurement.score >= least:
                enough = middle
            else:
                too_few = middle
        counts[group] = legal[enough]
    return counts
