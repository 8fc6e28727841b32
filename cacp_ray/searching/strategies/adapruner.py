"""AdaPruner: widths from the scales of batch normalisation, inheritance decided by evaluation.

The keep ratio of a group is a common factor times its mean |BN scale|, the factor found by
bisection. Then several criteria compete for which channels are inherited: each is measured, and the
best stays.

Source: after AdaPruner (Liu et al., arXiv 2109.06397), from its abstract: block importance,
bisection to the budget, criteria decided by evaluation. Ours: groups where the paper has blocks,
exact budgets, and the run's recovery where the paper re-estimates BN statistics.
"""

import numpy as np

from cacp_ray.searching.budget import scale_to_budget, spend
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import Proposal

ORDERS = ("l1", "l2", "fpgm", "bn_scale")  # beside the run's own


def make_adapruner(problem: Problem) -> Procedure:
    """The strategy.

    Raises:
        ConfigError: Too few evaluations for every order at every rate.
    """
    problem.check_evaluations("adapruner", 1 + len(ORDERS))

    def steps() -> Steps:
        budget, rates = problem.budget, problem.rates
        scales = np.array([score.mean() for score in problem.scores("bn_scale")])
        ratios = np.tile(np.maximum(scales / scales.max(), 1e-6), (len(rates), 1))
        counts = spend(budget, scale_to_budget(budget, ratios, rates), rates)
        yield [
            Proposal(rate, tuple(row), order)
            for order in ("", *ORDERS)
            for rate, row in zip(rates, counts.tolist(), strict=True)
        ]

    return Procedure("adapruner", steps)
