"""Network Adjustment: channels move from groups that need them least to those that need them most.

In a round, every group alone loses random channels, each at a rate that drops equal cost. The rise
of the loss says how much the group makes of its cost. The groups that rise most are widened, those
that rise least are narrowed, and all are scaled to the same budget. Then training goes on.

Source: Network Adjustment (Chen et al., CVPR 2020; authors' code): utilisation by dropped channels
at equal cost, drop rate 0.1, widths changed by 0.15, less in every round. Ours: channels come and
go in the importance order of the base network, and keep the weights they had; the loss is that of a
training batch, where the paper has a validation split; a quarter of the groups is
widened, and a quarter narrowed, where the paper names a number; and eight rounds within one
training, where the paper trains anew in each.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.searching.budget import Floats, Ints, spend, uniform
from cacp_ray.searching.widths.method import (
    TrainingBatch,
    WidthProblem,
    Widths,
    prefix_masks,
)

DROPPED = 0.1  # mean share of a group's channels that are dropped
DRAWS = 2  # times that each group drops channels in a round
ROUNDS = 8  # each passes a batch twice through the network for every group
CHANGED = 0.15  # share by which widths change in the first round; it falls to zero
MOVED = 0.25  # share of the groups that are widened, and that are narrowed


class NetworkAdjustment:
    """Moves channels between the groups of one network, for one rate."""

    def __init__(self, problem: WidthProblem, model: nn.Module) -> None:
        """Attaches gates; the first widths are those of `problem.start`, or uniform."""
        self._problem = problem
        self._gates = ChannelGates(model, problem.plan)
        groups = len(problem.plan.groups)
        start = problem.start
        if start is None:
            start = uniform(problem.budget, problem.rates, np.ones(groups))[0]
        self._counts = spend(problem.budget, start[None].astype(np.float64), problem.rates)[0]
        self._steps = self._rounds = 0
        self._batch: TrainingBatch | None = None
        self._close()

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The recipe's loss of the network as wide as it is now."""
        self._batch = batch
        return batch.loss()

    def after_step(self) -> None:
        """Widens and narrows where a round is due."""
        self._steps += 1
        # The first round comes after some training, the last leaves some.
        if self._steps * (ROUNDS + 1) >= (self._rounds + 1) * self._problem.steps and (
            self._rounds < ROUNDS
        ):
            self._play_round()
        self._batch = None

    def finish(self) -> list[Widths]:
        """The widths as they are."""
        return [Widths(self._problem.rates[0], self._counts, self._problem.orders)]

    def state_dict(self) -> dict[str, Any]:
        """Widths, and how far the training is."""
        counts = torch.as_tensor(self._counts)
        return {"steps": self._steps, "rounds": self._rounds, "keep_counts": counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        self._steps, self._rounds = state["steps"], state["rounds"]
        self._counts = state["keep_counts"].numpy()
        self._close()

    def _close(self) -> None:
        self._gates.values = prefix_masks(self._problem.orders, self._counts)

    def _play_round(self) -> None:
        problem, budget = self._problem, self._problem.budget
        movable = np.flatnonzero(budget.min_counts < budget.num_channels)
        used = self._measure_use(movable)
        number = max(1, round(MOVED * len(movable)))
        ranked = movable[np.argsort(-used, kind="stable")]
        change = CHANGED * (1 - self._rounds / ROUNDS)
        desired = self._counts.astype(np.float64)
        if len(movable) > 1:
            desired[ranked[:number]] *= 1 + change
            desired[ranked[-number:]] *= 1 - change
        # A change of less than a channel still moves one.
        moved = np.sign(desired - self._counts) * np.maximum(
            np.abs(desired - self._counts), budget.round_to
        )
        wanted = self._counts + np.where(desired == self._counts, 0, moved)
        self._counts = spend(budget, wanted[None], problem.rates)[0]
        self._rounds += 1
        self._close()

    @torch.no_grad()
    def _measure_use(self, movable: Ints) -> Floats:
        """(M,) rise of the loss when a group drops channels, at equal cost for all groups."""
        batch = self._batch
        assert batch is not None
        model, images = batch.model, len(batch.y)
        budget, counts = self._problem.budget, self._counts
        less = np.maximum(counts - np.eye(len(counts), dtype=np.int64)[movable], 1)
        costs = np.maximum(budget.cost(counts) - budget.cost(less), 1) * counts[movable]  # (M,)
        rates = np.minimum(DROPPED * costs.mean() / costs, 0.5)
        masks = self._gates.split(prefix_masks(self._problem.orders, counts))
        rng = self._problem.rng(self._steps)

        def measure() -> float:
            return float(batch.loss())

        model.eval()
        self._close()
        whole = measure()
        rises: list[float] = []
        for group, rate in zip(movable.tolist(), rates.tolist(), strict=True):
            losses: list[float] = []
            for _ in range(DRAWS):
                keeps = rng.random((images, masks[int(group)].numel())) >= rate
                dropped = [mask.expand(images, -1) for mask in masks]
                dropped[group] = dropped[group] * torch.as_tensor(keeps) / (1 - rate)
                self._gates.values = torch.cat(dropped, 1).float()
                losses.append(measure())
            rises.append(sum(losses) / DRAWS - whole)
        model.train()
        return np.array(rises, dtype=np.float64)
