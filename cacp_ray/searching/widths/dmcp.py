"""DMCP: the width of every group is a Markov chain whose probabilities are learned.

A group's channels beyond its smallest count form blocks. Block k is kept with probability p_k if
block k - 1 is, so it is kept at all with the product of p_1 to p_k. Two kinds of steps alternate.
The weights learn by the sandwich rule: the whole network, the narrowest one, and widths that are
drawn from the chains, which learn from the whole network's answers. The probabilities learn from
the loss of the network whose channels are scaled by their probabilities, plus the logarithm of the
distance between its expected cost and the budget, above the budget or below 0.95 of it.

One training serves all rates of a run: the weights are shared, and every rate has chains of its
own, from which one width is drawn in each step.

Source: DMCP (Guo et al., CVPR 2020; authors' code): the chains, expected cost, weight 0.1, dead
zone, blocks of a tenth of the channels, sandwich rule with in-place distillation. Ours: chains for
groups of coupled layers; the training starts from a trained network in its importance order, and
goes on from its weights, where the paper trains the found network from nothing; several rates at
once; all probabilities begin at 0.95; and the expected widths are projected onto the budget.
"""

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.searching.budget import Ints, spend
from cacp_ray.searching.widths.method import (
    TrainingBatch,
    WidthProblem,
    Widths,
    check_derivative,
    expected_cost,
    own_statistics,
    prefix_masks,
)
from cacp_ray.training.objective import (
    count_classes,
    distillation_loss,
    fast_autocast,
    read_scores,
)

COST_WEIGHT = 0.1  # of the cost term
DEAD_ZONE = 0.95  # share of the budget above which a network is not pushed to grow
BLOCK = 0.1  # share of a group's channels in a block
FIRST_LOGIT = 3.0  # of every probability
STEP = 0.1  # Adam's step for the logits


class DMCP:
    """Learns weights that serve many widths, and the widths of all rates."""

    def __init__(self, problem: WidthProblem, model: nn.Module) -> None:
        """Attaches gates to the network.

        Raises:
            ConfigError: The cost of a rate has no derivative.
        """
        check_derivative("dmcp", problem)
        self._problem = problem
        self._gates = ChannelGates(model, problem.plan)
        self._blocks = [
            _block_of(order, least, whole, problem.budget.round_to)
            for order, least, whole in zip(
                problem.orders,
                problem.budget.min_counts.tolist(),
                problem.budget.num_channels.tolist(),
                strict=True,
            )
        ]
        most = max(1, *(int(block.max()) for block in self._blocks))
        # One row a group; the logits of blocks that a group does not have stay as they are.
        shape = (len(problem.rates), len(self._blocks), most)
        self._logits = torch.full(shape, FIRST_LOGIT, requires_grad=True)
        self._optimizer: Any = torch.optim.Adam([self._logits], lr=STEP)
        self._batch: TrainingBatch | None = None
        self._steps = 0

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The recipe's loss of the whole network, and the distance of narrower ones from it."""
        self._batch, model, x = batch, batch.model, batch.x
        self._gates.values = None
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda module, args, output: outputs.append(output))
        total = batch.loss()
        hook.remove()
        read = partial(read_scores, num_classes=partial(count_classes, model, x[:1]))
        whole = read(outputs[0])[0].detach()
        for counts in [self._problem.budget.min_counts, *self._draw()]:
            self._gates.values = prefix_masks(self._problem.orders, counts)
            with own_statistics(model), fast_autocast(x.device.type):
                narrow = read(model(x))[0]
            total = total + distillation_loss(narrow, whole, batch.recipe.temperature)
        self._gates.values = None
        return total

    def after_step(self) -> None:
        """Moves the probabilities of every rate, with the weights as they are."""
        batch = self._batch
        assert batch is not None
        budget = self._problem.budget
        gradients: list[Tensor] = []
        for row, rate in enumerate(self._problem.rates):
            marginals = self._marginals(row)
            self._gates.values = torch.cat(marginals)
            with own_statistics(batch.model):
                loss = batch.loss()
            expected = expected_cost(self._problem, torch.stack([m.sum() for m in marginals]))
            limit = float(budget.limit(rate))
            away = (expected - limit) / budget.total
            if expected > limit or expected < DEAD_ZONE * limit:
                loss = loss + COST_WEIGHT * torch.log(away.abs() + 1e-3).to(loss.device)
            gradients += torch.autograd.grad(loss, [self._logits])
        self._logits.grad = torch.stack(gradients).sum(0)
        self._optimizer.step()
        self._gates.values = None
        self._batch = None
        self._steps += 1

    def finish(self) -> list[Widths]:
        """The expected widths of every rate, on the budget."""
        desired = np.array(
            [[m.sum().item() for m in self._marginals(row)] for row in range(len(self._logits))]
        )
        counts = spend(self._problem.budget, desired, self._problem.rates)
        return [
            Widths(rate, row, self._problem.orders)
            for rate, row in zip(self._problem.rates, counts, strict=True)
        ]

    def state_dict(self) -> dict[str, Any]:
        """The logits with their optimizer, and the steps."""
        return {
            "steps": self._steps,
            "logits": self._logits.detach(),
            "optimizer": self._optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        self._steps = state["steps"]
        with torch.no_grad():
            self._logits.copy_(state["logits"])
        self._optimizer.load_state_dict(state["optimizer"])

    def _marginals(self, row: int) -> list[Tensor]:
        """(C,) probability of each channel of every group, for one rate."""
        chains = torch.sigmoid(self._logits[row]).cumprod(1)  # (G, K)
        always = torch.ones(len(chains), 1)
        chains = torch.cat([always, chains], 1)
        return [chains[g][block] for g, block in enumerate(self._blocks)]

    def _draw(self) -> list[Ints]:
        """Widths from the chains of each rate; two of a lone rate."""
        rng = self._problem.rng(self._steps)
        rows = range(len(self._logits))
        drawn: list[Ints] = []
        with torch.no_grad():
            for row in [*rows, *([0] if len(rows) == 1 else [])]:
                chances = torch.sigmoid(self._logits[row]).numpy()  # (G, K)
                is_on = (rng.random(chances.shape) < chances).cumprod(1).sum(1)
                counts = [int((b <= n).sum()) for b, n in zip(self._blocks, is_on, strict=True)]
                drawn.append(np.array(counts, dtype=np.int64))
        return drawn


def _block_of(order: Any, least: int, whole: int, round_to: int) -> Tensor:
    """(C,) block of each channel: 0 for the first `least` of the order, which are always kept."""
    size = max(1, round(BLOCK * whole / round_to)) * round_to
    block = torch.zeros(whole, dtype=torch.int64)
    place = torch.arange(whole)
    block[torch.as_tensor(order)] = torch.where(place < least, 0, 1 + (place - least) // size)
    return block
