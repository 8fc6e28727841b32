"""AdaPruner: widths from the scales of batch normalisation, inheritance decided by evaluation.

The keep ratio of a group is its mean |BN scale| times a common factor, which bisection finds. Then
several criteria compete for which channels are inherited: all are measured, and the best stays.

Source: after AdaPruner (Liu et al., arXiv 2109.06397), from its abstract: block importance,
bisection to the budget, criteria decided by evaluation. Ours: groups where the paper has blocks,
exact budgets, and the run's recovery where the paper re-estimates BN statistics.
"""

import itertools

import numpy as np

from cacp_ray.searching.budget import scale_to_budget, spend
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import make_candidates

ORDERS = ("l1", "l2", "fpgm", "bn_scale")  # criteria measured in addition to the run's


def make_adapruner(problem: Problem) -> Procedure:
    """The strategy; it needs an evaluation for every criterion at every rate."""
    problem.check_evaluations("adapruner", 1 + len(ORDERS))

    def steps() -> Steps:
        budget, rates = problem.budget, problem.rates
        scales = np.array([score.mean() for score in problem.scores("bn_scale")])
        ratios = np.tile(np.maximum(scales / scales.max(), 1e-6), (len(rates), 1))
        counts = spend(budget, scale_to_budget(budget, ratios, rates), rates)
        by_criterion = [make_candidates(rates, counts, criterion) for criterion in ("", *ORDERS)]
        yield list(itertools.chain(*by_criterion))

    return Procedure("adapruner", steps)
