"""Chooses the prior by measuring it, then hands over to the strategy that starts from it.

The priors are uniform allocations over all groups or over inner groups alone, and allocations from
a sensitivity map, in which every group is cut alone to a few widths (see sensitivity.py). Their
measurements are ordinary evaluations: they count, they are recorded, and those at the run's rates
are told to the strategy that continues from the best prior.
"""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.allocation import Prior
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, Steps
from cacp_ray.searching.strategies.sensitivity import plan_map, propose, read_maps
from cacp_ray.searching.strategy import Strategy, learn, make_candidates

MAP_SHARE = 0.2  # share of the evaluations that a sensitivity map may take
MOST_WIDTHS = 4  # widths of a group in the map

Result = tuple[Candidate, Measurement]


def uniform_priors(cost_model: CostModel) -> dict[str, Prior]:
    """Uniform priors over all groups, and over the inner ones where those are not all or none."""
    is_inner = np.array([not group.is_residual for group in cost_model.groups])
    priors = {"all": Prior(np.ones_like(is_inner))}
    return priors if is_inner.all() or not is_inner.any() else priors | {"inner": Prior(is_inner)}


class PriorFirst:
    """Measures every prior at every rate, then hands over to the strategy made for the best."""

    def __init__(self, problem: Problem, make: Callable[[Prior], Strategy], name: str) -> None:
        """Takes what makes the strategy that goes on, and its name; its state is kept with ours."""
        self.name = name
        self.prior: str | None = None  # name of the prior chosen
        self.strategy: Strategy | None = None  # starts from that prior
        self._problem = problem
        self._make = make
        self._chosen: Prior | None = None
        self._results: list[Result] = []  # at the run's rates
        self._first = Procedure(name, self._choose)

    def _choose(self) -> Steps:
        problem = self._problem
        priors = uniform_priors(problem.cost_model)
        num_widths = int(MAP_SHARE * problem.evaluations) // max(1, len(problem.prunable))
        trials = plan_map(problem, min(num_widths, MOST_WIDTHS)) if num_widths else []
        candidates = self._propose(priors.values())
        num_answers = len(candidates)
        told = yield candidates + [propose(problem, trial) for trial in trials]
        measurements = told[:num_answers]
        if trials:
            damages = read_maps(problem, trials, told[num_answers:])
            maps = [Prior(priors["all"].weights, damage) for damage in damages]
            priors |= zip(("map of accuracy", "map of loss"), maps, strict=True)
            answers = self._propose(maps)
            candidates += answers
            measurements += yield answers
        self._results = [
            (dataclasses.replace(candidate, index=measurement.index), measurement)
            for candidate, measurement in zip(candidates, measurements, strict=True)
        ]
        score = np.array([measurement.score for measurement in measurements])
        means = score.reshape(len(priors), -1).mean(axis=1)
        self.prior = list(priors)[int(np.argmax(means))]
        self._chosen = priors[self.prior]

    def _propose(self, priors: Iterable[Prior]) -> list[Candidate]:
        """The allocations of priors at every rate."""
        rates, budget = self._problem.rates, self._problem.budget
        allocations = (make_candidates(rates, prior.allocate(budget, rates)) for prior in priors)
        return list(itertools.chain.from_iterable(allocations))

    def ask(self, count: int) -> list[Candidate]:
        """Candidates of the priors first; none while their measurements are awaited."""
        return (self.strategy or self._first).ask(count)

    def tell(self, results: Sequence[Result]) -> None:
        """Chooses the prior once all are measured, and tells the strategy results at its rates."""
        if self.strategy is not None:
            # The strategy knows the run's rates alone; probes have none of them.
            self.strategy.tell([row for row in results if row[0].rate in self._problem.rates])
            return
        self._first.tell(results)
        if strategy := self._go_on():
            strategy.tell(self._results)

    def learn(self) -> Mapping[str, float]:
        """Lets the strategy learn, once the prior is chosen."""
        return {} if self.strategy is None else learn(self.strategy)

    def save(self, folder: Path) -> None:
        """Writes the measurements of the priors, and the state of the strategy."""
        self._first.save(folder)
        if self.strategy is not None:
            inner = folder / self.name
            inner.mkdir()
            self.strategy.save(inner)

    def restore(self, folder: Path) -> None:
        """Restores what `save` wrote."""
        self._first.restore(folder)
        if strategy := self._go_on():
            strategy.restore(folder / self.name)

    def _go_on(self) -> Strategy | None:
        """Makes the strategy once the prior is chosen, and returns it."""
        self._first.advance()
        if self._chosen is not None and self.strategy is None:
            self.strategy = self._make(self._chosen)
        return self.strategy
