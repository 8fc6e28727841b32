"""Chooses the agent's prior by measuring it: uniform over all groups, or over inner groups alone.

The uniform candidates are evaluations like any other: they count, are recorded, and are told to the
strategy that goes on from the better prior.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.files import read_json, write_json
from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget, uniform
from cacp_ray.searching.strategy import Proposal, Strategy

Weights = NDArray[np.int64]
Result = tuple[Candidate, Measurement]


def prior_weights(cost_model: CostModel) -> dict[str, Weights]:
    """(G,) per prior: 1 for groups that share the cut, 0 for groups that stay whole."""
    is_inner = np.array([not group.is_residual for group in cost_model.groups], dtype=np.int64)
    priors = {"all": np.ones_like(is_inner), "inner": is_inner}
    return {"all": priors["all"]} if is_inner.all() or not is_inner.any() else priors


class PriorFirst:
    """Measures every prior at every rate, then hands over to the strategy made for the best."""

    def __init__(
        self,
        cost_model: CostModel,
        budget: Budget,
        rates: Sequence[float],
        make: Callable[[Weights], Strategy],
        name: str,
    ) -> None:
        """Works the uniform candidates out; every rate must be reachable.

        Args:
            cost_model: Of the whole network.
            budget: Which keep counts a rate allows.
            rates: That are searched.
            make: Prior weights (G,) -> the strategy that goes on; its state is kept with ours.
            name: Of that strategy.
        """
        self.name = name
        self.prior: str | None = None
        self._make = make
        self._weights = prior_weights(cost_model)
        self._proposals = {
            prior: [
                Proposal(rate, tuple(row))
                for rate, row in zip(rates, uniform(budget, rates, weights).tolist(), strict=True)
            ]
            for prior, weights in self._weights.items()
        }
        self._queue = list(dict.fromkeys(p for group in self._proposals.values() for p in group))
        self._results: list[Result] = []
        self._strategy: Strategy | None = None

    def ask(self, count: int) -> list[Proposal]:
        """Uniform candidates first; nothing while their measurements are awaited."""
        if self._strategy is not None:
            return self._strategy.ask(count)
        asked, self._queue = self._queue[:count], self._queue[count:]
        return asked

    def tell(self, results: Sequence[Result]) -> None:
        """Chooses the prior as soon as every uniform candidate is measured."""
        if self._strategy is not None:
            self._strategy.tell(results)
            return
        self._results += results
        top1 = {(c.rate, c.keep_counts): m.top1 for c, m in self._results}
        keys = {
            prior: [(proposal.rate, proposal.keep_counts) for proposal in proposals]
            for prior, proposals in self._proposals.items()
        }
        if all(key in top1 for group in keys.values() for key in group):
            means = {prior: np.mean([top1[key] for key in group]) for prior, group in keys.items()}
            self._go_on(max(means, key=lambda prior: means[prior]))
            assert self._strategy is not None
            self._strategy.tell(self._results)

    def _go_on(self, prior: str) -> None:
        self.prior = prior
        self._strategy = self._make(self._weights[prior])

    def save(self, folder: Path) -> None:
        """Writes the choice, or what is measured so far, and the state of the strategy."""
        results = [] if self._strategy is not None else self._results
        state: dict[str, Any] = {
            "prior": self.prior,
            "results": [[asdict(candidate), asdict(found)] for candidate, found in results],
        }
        write_json(folder / "prior.json", state)
        if self._strategy is not None:
            inner = folder / self.name
            inner.mkdir()
            self._strategy.save(inner)

    def restore(self, folder: Path) -> None:
        """Goes on where `save` stood."""
        state = read_json(folder / "prior.json")
        if state["prior"] is not None:
            self._queue = []
            self._go_on(state["prior"])
            assert self._strategy is not None
            self._strategy.restore(folder / self.name)
            return
        results: list[Result] = []
        for candidate, found in state["results"]:
            candidate["keep_counts"] = tuple(candidate["keep_counts"])
            results.append((Candidate(**candidate), Measurement(**found)))
        told = {(candidate.rate, candidate.keep_counts) for candidate, _ in results}
        self._queue = [p for p in self._queue if (p.rate, p.keep_counts) not in told]
        self.tell(results)
