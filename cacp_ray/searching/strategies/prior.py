"""Chooses the prior by measuring it, then hands over to the strategy that starts from it.

The candidates are uniform allocations over all groups, or over inner groups alone, and those of a
sensitivity map: every group cut alone to a few widths (see sensitivity.py). All of them are
evaluations like any other: they count, are recorded, and those at the run's rates are told to the
strategy that goes on from the best prior.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.allocation import Prior
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategies.sensitivity import plan_map, propose, read_maps
from cacp_ray.searching.strategy import Proposal, Strategy

MAP_SHARE = 0.2  # of the evaluations that a sensitivity map may take
MOST_WIDTHS = 4  # of a group in it

Result = tuple[Candidate, Measurement]


def uniform_priors(cost_model: CostModel) -> dict[str, Prior]:
    """Over all groups, and where that is something else over the inner ones."""
    is_inner = np.array([not group.is_residual for group in cost_model.groups])
    priors = {"all": Prior(np.ones_like(is_inner)), "inner": Prior(is_inner)}
    return {"all": priors["all"]} if is_inner.all() or not is_inner.any() else priors


class PriorFirst:
    """Measures every prior at every rate, then hands over to the strategy made for the best."""

    def __init__(self, problem: Problem, make: Callable[[Prior], Strategy], name: str) -> None:
        """Starts nothing yet.

        Args:
            problem: The search.
            make: Prior -> the strategy that goes on; its state is kept with ours.
            name: Of that strategy.
        """
        self.name = name
        self.prior: str | None = None
        self._problem = problem
        self._make = make
        self._chosen: Prior | None = None
        self._results: list[Result] = []  # at the run's rates
        self._first = Procedure(name, self._choose)
        self._strategy: Strategy | None = None

    def _choose(self) -> Steps:
        problem = self._problem
        priors = uniform_priors(problem.cost_model)
        num_widths = int(MAP_SHARE * problem.evaluations) // max(1, len(problem.prunable))
        trials = plan_map(problem, min(num_widths, MOST_WIDTHS)) if num_widths else []
        answers = [self._propose(prior) for prior in priors.values()]
        found = yield [*itertools.chain(*answers), *(propose(problem, each) for each in trials)]
        if trials:
            damages = read_maps(problem, trials, found[-len(trials) :])
            for name, damage in zip(("accuracy", "loss"), damages, strict=True):
                priors[f"map of {name}"] = Prior(priors["all"].weights, damage)
            answers += [self._propose(prior) for prior in list(priors.values())[-2:]]
            found = [*found[: -len(trials)], *(yield [*itertools.chain(*answers[-2:])])]
        proposals = [*itertools.chain(*answers)]
        self._results = [
            (Candidate(each.index, proposal.rate, proposal.keep_counts), each)
            for proposal, each in zip(proposals, found, strict=True)
        ]
        means = np.array([each.top1 for each in found]).reshape(len(priors), -1).mean(axis=1)
        self.prior = list(priors)[int(np.argmax(means))]
        self._chosen = priors[self.prior]

    def _propose(self, prior: Prior) -> list[Proposal]:
        counts = prior.allocate(self._problem.budget, self._problem.rates)
        return [
            Proposal(rate, tuple(row))
            for rate, row in zip(self._problem.rates, counts.tolist(), strict=True)
        ]

    def ask(self, count: int) -> list[Proposal]:
        """Candidates of the priors first; nothing while their measurements are awaited."""
        return (self._strategy or self._first).ask(count)

    def tell(self, results: Sequence[Result]) -> None:
        """Chooses the prior as soon as all is measured, and tells the strategy what served it."""
        if self._strategy is None:
            self._first.tell(results)
            strategy = self._go_on()
            if strategy is not None:
                strategy.tell(self._results)
            return
        # Probes serve no rate of the run.
        mine = [each for each in results if each[0].rate in self._problem.rates]
        self._strategy.tell(mine)

    def save(self, folder: Path) -> None:
        """Writes what was measured, and the state of the strategy."""
        self._first.save(folder)
        if self._strategy is not None:
            inner = folder / self.name
            inner.mkdir()
            self._strategy.save(inner)

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        self._first.restore(folder)
        strategy = self._go_on()
        if strategy is not None:
            strategy.restore(folder / self.name)

    def _go_on(self) -> Strategy | None:
        """The strategy, once the prior is chosen."""
        self._first.advance()
        if self._chosen is not None and self._strategy is None:
            self._strategy = self._make(self._chosen)
        return self._strategy
