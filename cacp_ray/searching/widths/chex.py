"""CHEX: channels are pruned and grown again, round after round, while the network trains.

In a round, widths come from one threshold on the BN scales of all active channels, and every group
keeps those of its active channels that span most of its filters (leverage scores). Then a random
share of the pruned channels grows again with the weights and BN state that it had; the share falls
as a cosine to zero, so that the last round leaves exactly the budget.

Source: CHEX (Hou et al., CVPR 2022; authors' code): BN threshold, leverage scores, restored
channels, share 0.3 and its cosine. Ours: coupled layers share their channels, with the root of the
sum of their squared BN scales and with their filters side by side, each layer's divided by its
norm; the threshold is moved until the budget is met, where the paper sets a share of channels; the
training starts from a trained network, where the paper's starts from nothing; ROUNDS rounds in any
length of training; and which channels grow again is drawn evenly.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.pruning.criteria.common import add, slices, weight_norms, zeros
from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.torch_types import leading_directions, row_norms
from cacp_ray.searching.budget import Floats, Ints
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.widths.memory import ChannelMemory
from cacp_ray.searching.widths.method import (
    ROUNDS,
    TrainingBatch,
    WidthProblem,
    Widths,
    batch_norms,
    check_batch_norms,
    prefix_masks,
    sort_channels,
)

REGROWN = 0.3  # share of the pruned channels that grow again after the first round


class Chex:
    """Prunes and regrows the channels of one network for one rate."""

    def __init__(self, problem: WidthProblem, model: nn.Module) -> None:
        """Attaches gates; the first round is before the first step.

        Raises:
            ConfigError: A group has no BN layer.
        """
        check_batch_norms("chex", problem, model)
        self._problem, self._model = problem, model
        self._gates = ChannelGates(model, problem.plan)
        self._memory = ChannelMemory(model, problem.plan)
        self._active = self._gates.split(torch.ones(self._gates.size))
        self._steps = self._rounds = 0
        self._widths: Widths | None = None
        self._play_round()

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The recipe's loss of the active channels."""
        return batch.loss()

    def after_step(self) -> None:
        """Prunes and regrows where a round is due."""
        self._steps += 1
        if self._steps * ROUNDS >= self._rounds * self._problem.steps and self._rounds < ROUNDS:
            self._play_round()

    def finish(self) -> list[Widths]:
        """The widths of the last round, which grew nothing."""
        assert self._widths is not None
        return [self._widths]

    def state_dict(self) -> dict[str, Any]:
        """What is active, what was remembered, and how far the training is."""
        assert self._widths is not None
        return {
            "steps": self._steps,
            "rounds": self._rounds,
            "active": torch.cat(self._active),
            "memory": self._memory.copies,
            "keep_counts": torch.as_tensor(self._widths.keep_counts),
            "orders": [torch.as_tensor(order) for order in self._widths.orders],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        self._steps, self._rounds = state["steps"], state["rounds"]
        self._memory.load(state["memory"])
        orders = [order.numpy() for order in state["orders"]]
        self._widths = Widths(self._problem.rates[0], state["keep_counts"].numpy(), orders)
        self._set_active(state["active"])

    def _play_round(self) -> None:
        problem = self._problem
        tensors = {name: value.cpu() for name, value in self._model.state_dict().items()}
        scales = measure_scales(problem.plan, self._model)
        active = [mask.bool().numpy() for mask in self._active]
        # Pruned channels come after all active ones.
        scales = [np.where(on, scale, 0.0) for scale, on in zip(scales, active, strict=True)]
        counts = cut_at_threshold(problem.budget, scales, problem.rates)[0]
        leverage = score_leverage(problem.plan, tensors, counts)
        orders = sort_channels(
            [np.where(on, 1 + score, 0.0) for score, on in zip(leverage, active, strict=True)]
        )
        self._widths = Widths(problem.rates[0], counts, orders)
        kept = prefix_masks(orders, counts)
        pruned = self._gates.split(torch.cat(self._active).bool() & ~kept.bool())
        self._memory.keep(pruned)
        grown = self._draw_grown(self._gates.split(kept))
        # The budget may have room for some that were closed, besides those that are drawn.
        opened = (torch.cat(grown) | kept.bool()) & ~torch.cat(self._active).bool()
        self._memory.restore(self._gates.split(opened))
        self._set_active(torch.maximum(kept, torch.cat(grown).float()))
        self._rounds += 1

    def _draw_grown(self, kept: list[Tensor]) -> list[Tensor]:
        """(C,) booleans of the pruned channels that grow again in this round."""
        done = self._rounds / max(1, ROUNDS - 1)
        share = REGROWN * 0.5 * (1 + math.cos(math.pi * done))
        rng = self._problem.rng(self._rounds)
        grown: list[Tensor] = []
        for mask in kept:
            gone = (mask == 0).nonzero().flatten().numpy()
            number = round(share * len(gone))
            chosen = torch.zeros(len(mask), dtype=torch.bool)
            chosen[torch.as_tensor(rng.choice(gone, number, replace=False))] = True
            grown.append(chosen)
        return grown

    def _set_active(self, masks: Tensor) -> None:
        self._active = self._gates.split(masks)
        self._gates.values = masks


def measure_scales(plan: Plan, model: nn.Module) -> list[Floats]:
    """(C,) BN scale of every group's channels; zeros where no BN layer scales them.

    A residual stream adds its layers' outputs up, so their scales add as deviations do: the root of
    the sum of squares. Elsewhere several layers take the root of the mean of squares.
    """
    squares, layers = zeros(plan), zeros(plan)
    for norm, axis in batch_norms(plan, model):
        add(squares, axis, norm.weight.detach().double().square().cpu().numpy())
        add(layers, axis, np.ones(len(axis.group)))
    return [
        np.sqrt(square / (1 if group.is_residual else np.maximum(count, 1)))
        for group, square, count in zip(plan.groups, squares, layers, strict=True)
    ]


def score_leverage(plan: Plan, tensors: dict[str, Tensor], keep_counts: Ints) -> list[Floats]:
    """Leverage of every channel: (C,) for each group, its length in the K leading directions.

    A layer's filters are the columns of a matrix; V_k holds its K leading right singular vectors
    for K channels that are kept, and the score of channel j is the norm of row j of V_k. A group
    with fewer numbers a filter than K, or whose filters nobody makes, takes L1 norms.

    Source: CHEX, section 3.2. Ours: the layers of a group stand side by side.
    """
    filters: list[list[Tensor]] = [[] for _ in plan.groups]
    for rows, axis, is_filter in slices(plan, tensors):
        for g in axis.groups if is_filter else ():
            at = torch.as_tensor(axis.group == g)
            channel = torch.as_tensor(axis.channel)[at]
            own = torch.zeros(plan.groups[g].num_channels, rows.shape[1], dtype=torch.float64)
            own.index_add_(0, channel, rows[at])
            filters[g].append(own / max(float(own.square().sum()), 1e-60) ** 0.5)
    scores = weight_norms(plan, tensors, lambda rows: rows.abs().sum(1))
    for g, (parts, kept) in enumerate(zip(filters, keep_counts.tolist(), strict=True)):
        if parts and sum(part.shape[1] for part in parts) >= kept:
            directions = leading_directions(torch.cat(parts, 1))
            if directions.shape[1] >= kept:
                scores[g] = row_norms(directions[:, :kept]).numpy()
    return scores
