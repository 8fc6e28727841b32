"""Greedy: at every step the one group whose cut costs least for the MACs that it saves.

At each step every group alone is cut until the network meets the next target, all these candidates
are measured side by side, and the best goes on.

Source: after NetAdapt (Yang et al., ECCV 2018), whose steps cut one layer to a fixed saving;
AutoSlim (Yu and Huang, 2019) descends alike. Both measure after short fine-tuning or in a slimmable
network, here the recovery of the run takes its place. Ours: groups instead of layers, one descent
through all rates, and steps whose size follows from the number of evaluations.
"""

import numpy as np

from cacp_ray.searching.budget import Ints
from cacp_ray.searching.strategies.descent import Round, Target, make_descent, rank, shrink
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure


def make_greedy(problem: Problem) -> Procedure:
    """The strategy.

    Raises:
        ConfigError: Too few evaluations for one step a rate.
    """
    budget = problem.budget

    def cut(counts: Ints, target: Target) -> Round:
        limit = budget.limit(target.cost_kept)
        alone = [
            shrink(budget, counts, counts * (np.arange(len(counts)) == group), target.cost_kept)
            for group in problem.prunable
        ]
        fitting = [row for row in alone if budget.cost(row) <= limit]
        # Where no group alone can save so much, all give way together.
        if not fitting:
            fitting = [shrink(budget, counts, counts.astype(np.float64), target.cost_kept)]
        proposals = [target.propose(budget, row) for row in fitting]
        found = yield proposals
        best = max(range(len(found)), key=lambda index: rank(found[index]))
        return np.array(proposals[best].keep_counts)

    return make_descent(problem, "greedy", len(problem.prunable), cut)
