"""CPMC: one global ranking of all channels by weight, computation and parameters.

Nothing is searched: the threshold is moved until the budget fits. The widths are measured with
CPMC's own importance order and with the run's.

Source: after CPMC (IJCNN 2021, arXiv 2011.03240); `cacp_ray.pruning.criteria.cpmc` says what is the
paper's and what is ours. Ours: exact budgets, and the second order.
"""

from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import make_candidates

ORDERS = ("cpmc",)  # criteria measured in addition to the run's


def make_cpmc(problem: Problem) -> Procedure:
    """The strategy; it needs an evaluation for both orders at every rate."""
    problem.check_evaluations("cpmc", 1 + len(ORDERS))

    def steps() -> Steps:
        counts = cut_at_threshold(problem.budget, problem.scores("cpmc"), problem.rates)
        own, runs = (make_candidates(problem.rates, counts, name) for name in (*ORDERS, ""))
        yield own + runs

    return Procedure("cpmc", steps)
