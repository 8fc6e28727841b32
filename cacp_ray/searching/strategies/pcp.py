"""Progressive Channel Pruning: attempt a few channels of every group, select groups, prune.

Attempt: every group alone loses a few channels, all measured side by side with the recovery of the
run. Select: groups are sorted by how much the loss rose for the cost that they save, and the first
quarter, half or three quarters of them are cut together to the next target; the set that is
measured best is taken. Prune: the descent goes on from there, and delivers each rate as it passes.

Source: after Progressive Channel Pruning (Guo et al., TCSVT 2021, arXiv 2507.04792), of which only
the abstract was to be had: attempt, select, prune in rounds, several layers a round. Ours: the size
of an attempt, the loss where the paper has accuracy, sorting by cost, the sets that are compared,
one descent through all rates, and exact budgets.
"""

import math

import numpy as np

from cacp_ray.evaluation.measurement import Measurement
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.strategies.descent import Round, Target, make_descent, rank, shrink
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure
from cacp_ray.searching.strategy import Proposal

SHARES = (0.25, 0.5, 0.75)  # of the groups, cut together
ATTEMPT = 2.0  # times the cut that all groups together would need: about half of them take part


def make_pcp(problem: Problem) -> Procedure:
    """The strategy.

    Raises:
        ConfigError: Too few evaluations for one round a rate.
    """
    per_round = len(problem.prunable) + len(SHARES)

    def cut(counts: Ints, target: Target) -> Round:
        return _round(problem, counts, target)

    return make_descent(problem, "pcp", per_round, cut, before=1)


def _round(problem: Problem, counts: Ints, target: Target) -> Round:
    budget = problem.budget
    kept = target.cost_kept * budget.total / int(budget.cost(counts))
    # The cost of a layer grows with the channels it reads and with those it makes.
    steps = np.maximum(ATTEMPT * (1 - math.sqrt(kept)) * counts, budget.round_to)
    smaller = budget.floor_to_legal(counts.astype(np.float64) - steps)
    groups = [group for group in problem.prunable if smaller[group] < counts[group]]
    if not groups:
        yield [target.propose(budget, counts)]
        return counts
    attempts = [np.where(np.arange(len(counts)) == group, smaller, counts) for group in groups]
    found = yield [Proposal(1.0, tuple(row.tolist())) for row in [counts, *attempts]]
    saved = np.maximum(budget.cost(counts) - budget.cost(np.array(attempts)), 1)  # (A,)
    damage = np.array([_damage(each, found[0]) for each in found[1:]])
    ranked = np.array(groups)[np.argsort(damage / saved, kind="stable")]

    sets = [ranked[: math.ceil(share * len(ranked))] for share in SHARES]
    joint = [
        shrink(
            budget,
            counts,
            np.where(np.isin(np.arange(len(counts)), chosen), steps, 0.0),
            target.cost_kept,
        )
        for chosen in sets
    ]
    limit = budget.limit(target.cost_kept)
    fitting = [row for row in joint if budget.cost(row) <= limit]
    # Where these sets cannot save so much, all groups give way together.
    proposals = [
        target.propose(budget, row)
        for row in fitting or [shrink(budget, counts, counts.astype(np.float64), target.cost_kept)]
    ]
    found = yield proposals
    best = max(range(len(found)), key=lambda index: rank(found[index]))
    return np.array(proposals[best].keep_counts)


def _damage(attempt: Measurement, before: Measurement) -> float:
    """Rise of the loss: finer than accuracy, which a few channels may leave as it was."""
    return attempt.loss - before.loss if attempt.status == "ok" else math.inf
