"""Global ranking: one threshold on the importance of all channels, with or without their cost.

The run's own criterion scores the channels. Six readings of its scores compete: raw or normalised
in every group; undivided, or divided by the cost that the channel frees or the square root of that
cost. Every reading is cut at one threshold for every rate and measured.

Source: normalised scores and one ranking after Molchanov et al. (ICLR 2017); scores per cost freed
as in Group Fisher Pruning (Liu et al., ICML 2021). The competition is ours.
"""

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.pruning.cost import freed_by_one_channel
from cacp_ray.searching.ranking import cut_at_threshold, normalize
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import make_candidates

POWERS = (1.0, 0.5, 0.0)  # exponents of the cost freed


def make_global(problem: Problem) -> Procedure:
    """The strategy; it needs an evaluation for every reading at every rate."""
    problem.check_evaluations("global", 2 * len(POWERS))

    def steps() -> Steps:
        raw = problem.scores("")
        freed = freed_by_one_channel(problem.budget.cost, problem.budget.num_channels)
        candidates: list[Candidate] = []
        for scores in (raw, normalize(raw)):
            for power in POWERS:
                shares = [score / cost**power for score, cost in zip(scores, freed, strict=True)]
                counts = cut_at_threshold(problem.budget, shares, problem.rates)
                candidates += make_candidates(problem.rates, counts)
        yield candidates

    return Procedure("global", steps)
