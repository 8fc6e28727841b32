"""Sensitivity: one map of what every group loses when it alone is cut, then a solve per rate.

The map is measured once and serves any rate: a group may lose so much and no more, the same for
all, and that limit is moved until the budget fits. Both the drop of accuracy and the rise of the
loss are read as damage, and the better allocation stays.

Source: after the search of FastNAS in NVIDIA's ModelOpt (documentation: a sensitivity map, then
bisection on the largest degradation). Ours: linear interpolation between measured widths, both
kinds of damage, and exact budgets.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from cacp_ray.errors import ConfigError
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategy import Proposal

MOST_WIDTHS = 7  # measured of a group


def make_sensitivity(problem: Problem) -> Procedure:
    """The strategy.

    Raises:
        ConfigError: Too few evaluations for one width a group.
    """
    answers = 1 + 2 * len(problem.rates)  # the whole network, and both kinds of damage
    num_widths = (problem.evaluations - answers) // max(1, len(problem.prunable))
    if num_widths < 1:
        raise ConfigError(
            f"strategy sensitivity measures every group alone: raise evaluations to at least "
            f"{answers + len(problem.prunable)}"
        )
    return Procedure("sensitivity", lambda: _steps(problem, min(num_widths, MOST_WIDTHS)))


def _steps(problem: Problem, num_widths: int) -> Steps:
    budget, whole = problem.budget, problem.budget.num_channels
    trials: list[tuple[int, int]] = []  # group and keep count
    for group in problem.prunable:
        least = int(budget.min_counts[group])
        wanted = np.linspace(least, whole[group], num_widths, endpoint=False)
        one = slice(group, group + 1)
        trials += [
            (int(group), int(count)) for count in np.unique(budget.nearest_legal(wanted, one))
        ]
    proposals = [Proposal(1.0, tuple(whole.tolist()))]
    for group, count in trials:
        counts = np.where(np.arange(len(whole)) == group, count, whole)
        proposals.append(Proposal(1.0, tuple(counts.tolist())))
    found = yield proposals
    results = [(*trial, each) for trial, each in zip(trials, found[1:], strict=True)]
    results = [result for result in results if result[2].status == "ok"]
    drops = [(group, count, found[0].top1 - each.top1) for group, count, each in results]
    rises = [(group, count, each.loss - found[0].loss) for group, count, each in results]
    yield [
        Proposal(rate, tuple(row))
        for damages in (drops, rises)
        for rate, row in zip(
            problem.rates,
            cut_at_threshold(budget, _scores(whole, damages), problem.rates).tolist(),
            strict=True,
        )
    ]


def _scores(whole: Ints, damages: Sequence[tuple[int, int, float]]) -> list[NDArray[np.float64]]:
    """Per group (C,): the damage of losing channel c and all after it, never rising with c.

    Args:
        whole: (G,) channels of the whole network.
        damages: Group, keep count and damage of every measurement.
    """
    scores: list[NDArray[np.float64]] = []
    for group in range(len(whole)):
        channels = int(whole[group])
        points = sorted((count, damage) for g, count, damage in damages if g == group)
        table: Floats = np.array([*points, (channels, 0.0)])  # (points, 2)
        falling: Floats = np.maximum.accumulate(table[::-1, 1])[::-1]
        score: Floats = np.interp(np.arange(channels), table[:, 0], falling)
        scores.append(score)
    return scores
