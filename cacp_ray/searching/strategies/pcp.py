"""Progressive Channel Pruning: attempt a few channels of every group, select groups, prune.

Attempt: every group alone loses a few channels; all attempts are measured side by side with the
recovery of the run. Select: groups are sorted by the rise of the loss for the cost that they save.
The first quarter, half or three quarters of them are cut together to the next target, and the set
that measures best is taken. Prune: the descent continues from that set and delivers each rate as it
passes.

Source: after Progressive Channel Pruning (Guo et al., TCSVT 2021, arXiv 2507.04792), of which only
the abstract was available: attempt, select, prune in rounds, several layers a round. Ours: the size
of an attempt, the loss in place of the paper's accuracy, sorting by cost, the sets that are
compared, one descent through all rates, and exact budgets. In all rounds the importance order and
the recovery are those of the uncut network: only keep counts go on from round to round, where the
paper prunes the pruned network on.
"""

import math
from functools import partial

import numpy as np

from cacp_ray.evaluation.measurement import Measurement
from cacp_ray.searching.budget import Ints
from cacp_ray.searching.strategies.descent import Round, Target, choose, make_descent, shrink
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure
from cacp_ray.searching.strategy import make_candidates

SHARES = (0.25, 0.5, 0.75)  # shares of the groups that are cut together
ATTEMPT = 2.0  # times the cut that all groups together would need: about half of them take part


def make_pcp(problem: Problem) -> Procedure:
    """The strategy; it needs evaluations for one round a rate."""
    per_round = len(problem.prunable) + len(SHARES)

    return make_descent(problem, "pcp", per_round, partial(_round, problem), before=1)


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
    before, *after = yield make_candidates([1.0] * (1 + len(attempts)), [counts, *attempts])
    saved = np.maximum(budget.cost(counts) - budget.cost(np.array(attempts)), 1)  # (A,)
    damage = np.array([_damage(attempt, before) for attempt in after])
    ranked = np.array(groups)[np.argsort(damage / saved, kind="stable")]

    joint: list[Ints] = []
    for share in SHARES:
        is_cut = np.isin(np.arange(len(counts)), ranked[: math.ceil(share * len(ranked))])
        joint.append(shrink(budget, counts, np.where(is_cut, steps, 0.0), target.cost_kept))
    return (yield from choose(budget, counts, target, joint))


def _damage(attempt: Measurement, before: Measurement) -> float:
    """Rise of the loss, which is finer than a score: a few channels may not change accuracy."""
    return attempt.loss - before.loss if attempt.status == "ok" else math.inf
