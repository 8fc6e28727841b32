"""Greedy: at every step the one group whose cut costs least for the MACs that it saves.

At each step every group alone is cut until the network meets the next target. All these candidates
are measured side by side, and the next step starts from the best.

Source: after NetAdapt (Yang et al., ECCV 2018), whose steps cut one layer to a fixed saving;
AutoSlim (Yu and Huang, 2019) descends alike. They measure after short fine-tuning or in a slimmable
network; we measure after the recovery of the run. Ours: groups instead of layers, one descent
through all rates, and steps whose size follows from the number of evaluations.
"""

import numpy as np

from cacp_ray.searching.budget import Ints
from cacp_ray.searching.strategies.descent import Round, Target, choose, make_descent, shrink
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure


def make_greedy(problem: Problem) -> Procedure:
    """The strategy; it needs evaluations for one step a rate."""
    budget = problem.budget

    def cut(counts: Ints, target: Target) -> Round:
        alone = [
            shrink(budget, counts, counts * (np.arange(len(counts)) == group), target.cost_kept)
            for group in problem.prunable
        ]
        return choose(budget, counts, target, alone)

    return make_descent(problem, "greedy", len(problem.prunable), cut)
