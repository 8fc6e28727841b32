"""Sensitivity: one map of what every group loses when it alone is cut, then a solve per rate.

The map is measured once and serves any rate: one limit on the damage holds for all groups, and it
is moved until the budget fits. Both the drop of accuracy and the rise of the loss are read as
damage, and the better allocation stays.

Source: after the search of FastNAS in NVIDIA's ModelOpt (documentation: a sensitivity map, then
bisection on the largest degradation). Ours: linear interpolation between measured widths, both
kinds of damage, and exact budgets.
"""

from collections.abc import Sequence

import numpy as np

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import make_candidates

MOST_WIDTHS = 7  # measured widths of a group

Trial = tuple[int, int]  # group and keep count
Damage = list[Floats]  # per group (C,): damage of losing channel c and all after it


def make_sensitivity(problem: Problem) -> Procedure:
    """The strategy; it needs evaluations for one width a group."""
    others = 1 + 2 * len(problem.rates)  # the whole network, and both kinds of damage at each rate
    num_widths = (problem.evaluations - others) // max(1, len(problem.prunable))
    if num_widths < 1:
        raise ConfigError(
            f"strategy sensitivity measures every group alone: raise evaluations to at least "
            f"{others + len(problem.prunable)}"
        )

    def steps() -> Steps:
        trials = plan_map(problem, min(num_widths, MOST_WIDTHS))
        measurements = yield [propose(problem, trial) for trial in trials]
        candidates: list[Candidate] = []
        for damage in read_maps(problem, trials, measurements):
            counts = cut_at_threshold(problem.budget, damage, problem.rates)
            candidates += make_candidates(problem.rates, counts)
        yield candidates

    return Procedure("sensitivity", steps)


def plan_map(problem: Problem, num_widths: int) -> list[Trial]:
    """The whole network, then every group alone at `num_widths` counts from its smallest up."""
    budget, whole = problem.budget, problem.budget.num_channels
    trials: list[Trial] = [(0, int(whole[0]))]
    for group in problem.prunable:
        wanted = np.linspace(budget.min_counts[group], whole[group], num_widths, endpoint=False)
        counts = np.unique(budget.nearest_legal(wanted, slice(group, group + 1)))
        trials += [(int(group), int(count)) for count in counts if count < whole[group]]
    return trials


def propose(problem: Problem, trial: Trial) -> Candidate:
    """The whole network with one group at its trial's width."""
    counts = problem.budget.num_channels.copy()
    counts[trial[0]] = trial[1]
    return Candidate(1.0, tuple(counts.tolist()))


def read_maps(
    problem: Problem, trials: Sequence[Trial], measurements: Sequence[Measurement]
) -> tuple[Damage, Damage]:
    """The drop of accuracy and the rise of the loss, from the measurements of `plan_map`."""
    whole = problem.budget.num_channels
    before, *others = measurements
    pairs = zip(trials[1:], others, strict=True)
    results = [(trial, after) for trial, after in pairs if after.status == "ok"]
    drops = [(*trial, before.score - after.score) for trial, after in results]
    rises = [(*trial, after.loss - before.loss) for trial, after in results]
    return _interpolate(whole, drops), _interpolate(whole, rises)


def _interpolate(whole: Ints, damages: Sequence[tuple[int, int, float]]) -> Damage:
    """The damage, never rising with c, from rows of group, keep count and damage."""
    scores: Damage = []
    for group, channels in enumerate(map(int, whole)):
        points = sorted((count, damage) for g, count, damage in damages if g == group)
        table: Floats = np.array([*points, (channels, 0.0)])  # (points, 2)
        falling: Floats = np.maximum.accumulate(table[::-1, 1])[::-1]
        score: Floats = np.interp(np.arange(channels), table[:, 0], falling)
        scores.append(score)
    return scores
