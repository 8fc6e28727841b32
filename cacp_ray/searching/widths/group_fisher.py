"""Group Fisher pruning: channel after channel is deleted while the network trains.

Every channel has a gate, and the squared derivative of each image's loss by its gate is summed over
an interval. Then the channels with the least sum for the cost that they free are deleted, one after
another, until the cost is where the schedule has it. Freed costs follow the deletions.

Source: Group Fisher Pruning (Liu et al., ICML 2021, eq. 5-8, alg. 1): gates that coupled layers
share, sums over an interval, division by the cost that is freed, live costs. Ours: several channels
may go in one interval, as many as a cost that falls in equal steps needs, where the paper deletes
one every 25 steps; and deletion ends after nine tenths of the training. The criterion
`group_fisher` ranks channels once, on the network as it was.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.searching.budget import spend
from cacp_ray.searching.widths.method import TrainingBatch, WidthProblem, Widths

INTERVAL = 25  # steps between deletions, fewer in a short training
FEWEST = 16  # times that channels are deleted
DELETING = 0.9  # share of the training in which channels are deleted


class GroupFisher:
    """Deletes the channels of one network until one rate is met."""

    def __init__(self, problem: WidthProblem, model: nn.Module) -> None:
        """Attaches gates."""
        self._problem = problem
        self._gates = ChannelGates(model, problem.plan)
        self._mask = torch.ones(self._gates.size)
        self._sums = torch.zeros(self._gates.size, dtype=torch.float64)
        self._deleted: list[int] = []
        self._steps = 0
        self._probe = torch.empty(0)
        self._interval = max(1, min(INTERVAL, int(DELETING * problem.steps / FEWEST)))

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The recipe's loss, with a gate for each image and channel."""
        self._probe = torch.ones(len(batch.y), self._gates.size, requires_grad=True)
        self._gates.values = self._probe * self._mask
        return batch.loss()

    def after_step(self) -> None:
        """Adds the squared derivatives, and deletes channels where an interval ends."""
        gradient = self._probe.grad
        assert gradient is not None
        self._sums += (len(gradient) * gradient).double().square().sum(0)
        self._gates.values = self._mask
        self._steps += 1
        if self._steps % self._interval == 0:
            self._delete()

    def finish(self) -> list[Widths]:
        """What is left, with the last deleted channels back where the budget has room."""
        problem = self._problem
        self._delete(done=1.0)
        masks = [mask.numpy() for mask in self._gates.split(self._mask)]
        age = np.zeros(self._gates.size)
        age[self._deleted] = np.arange(len(self._deleted)) - len(self._deleted)  # the last: -1
        orders = [
            np.argsort(-own, kind="stable")
            for own in np.split(age, np.cumsum([len(mask) for mask in masks])[:-1])
        ]
        left = np.array([[mask.sum() for mask in masks]], dtype=np.float64)
        counts = spend(problem.budget, left, problem.rates)[0]
        return [Widths(problem.rates[0], counts, orders)]

    def state_dict(self) -> dict[str, Any]:
        """What is deleted, the sums since, and the steps."""
        deleted = torch.as_tensor(self._deleted, dtype=torch.int64)
        return {"steps": self._steps, "deleted": deleted, "sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        self._steps, self._deleted = state["steps"], state["deleted"].tolist()
        self._sums.copy_(state["sums"])
        self._mask = torch.ones(self._gates.size)
        self._mask[self._deleted] = 0
        self._gates.values = self._mask

    def _delete(self, done: float | None = None) -> None:
        """Deletes channels until the cost is where the schedule has it."""
        budget = self._problem.budget
        if done is None:
            done = min(1.0, self._steps / (DELETING * self._problem.steps))
        limit = budget.total - done * (budget.total - int(budget.limit(self._problem.rates[0])))
        mask = self._mask.bool()
        sizes = [len(part) for part in self._gates.split(mask)]
        group = np.repeat(np.arange(len(sizes)), sizes)  # (S,)
        counts = np.array([int(part.sum()) for part in self._gates.split(mask)])
        sums = self._sums.numpy()
        while budget.cost(counts) > limit:
            less = np.maximum(counts - np.eye(len(counts), dtype=np.int64), 0)  # (G, G)
            freed = np.maximum(budget.cost(counts) - budget.cost(less), 1)
            may_go = mask.numpy() & (counts > budget.min_counts)[group]
            if not may_go.any():
                break
            worst = int(np.where(may_go, sums / freed[group], np.inf).argmin())
            mask[worst] = False
            counts[group[worst]] -= 1
            self._deleted.append(worst)
        self._sums.zero_()
        self._mask = mask.float()
        self._gates.values = self._mask
