"""SCP: channels that their BN layer leaves dead are masked softly, then for good.

The output of a BN layer is about a Gaussian with mean beta and deviation |gamma|, so the ReLU after
it answers zero with probability Phi(-beta / |gamma|). A channel is scaled by a sigmoid of the
distance between that probability and a threshold. The threshold falls until the expected cost
is the budget, the sigmoid sharpens, and a sparsity term draws channels towards death.

Source: SCP (Kang and Han, ICML 2020), from its abstract and secondary sources: the dead
probability, the differentiable masks, joint training of weights and masks with a sparsity term.
Ours: the threshold that follows a falling budget, where the paper keeps one number; all schedules;
a residual stream is the sum of its layers' Gaussians; groups with several BN layers otherwise take
the mean; a channel that no ReLU reads is dead where it is near zero; the sparsity term weighs
channels by their cost; and the budget is met exactly at the end.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cacp_ray.pruning.cost import freed_by_one_channel
from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.pruning.torch_types import normal_cdf
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.widths.method import (
    TrainingBatch,
    WidthProblem,
    Widths,
    batch_norms,
    check_batch_norms,
    check_derivative,
    expected_cost,
    sort_channels,
)

SPARSITY = 0.1  # weight of the share of the cost that is alive
FALLING = 2 / 3  # share of the training over which the budget falls to the rate
SHARPNESS = (20.0, 500.0)  # slope of the masks at the beginning and at the end
NEAR_ZERO = 0.5  # of the group's mean |gamma|: below it an unrectified channel counts as dead
ALIVE = -10.0  # in place of the probability, for groups that may not be cut
RECTIFIED = -0.4  # least input of a layer after an activation: hard-swish goes down to -0.375


class SCP:
    """Learns which channels of one network die, for one rate."""

    def __init__(self, problem: WidthProblem, model: nn.Module) -> None:
        """Attaches gates.

        Raises:
            ConfigError: A group has no BN layer, or the cost of a rate has no derivative.
        """
        check_batch_norms("scp", problem, model)
        check_derivative("scp", problem)
        self._problem, self._model = problem, model
        self._stays = problem.budget.min_counts == problem.budget.num_channels
        self._gates = ChannelGates(model, problem.plan)
        self._norms = batch_norms(problem.plan, model)
        self._is_rectified: list[bool] = []
        self._steps = 0

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The recipe's loss behind soft masks, and the share of the cost that is alive."""
        if not self._is_rectified:
            self._is_rectified = find_rectified(self._problem, batch.model, batch.x)
        dead = self.dead_probabilities()
        with torch.no_grad():
            threshold = self._find_threshold(torch.cat(dead))
        self._gates.values = self._masks(torch.cat(dead), threshold)
        loss = batch.loss()
        budget = self._problem.budget
        freed = freed_by_one_channel(budget.cost, budget.num_channels) / budget.total
        alive = [cost * (1 - p).sum() for cost, p in zip(freed.tolist(), dead, strict=True)]
        return loss + SPARSITY * torch.stack(alive).sum()

    def after_step(self) -> None:
        """Sharpens the masks and lowers the budget."""
        self._steps += 1
        with torch.no_grad():
            dead = torch.cat(self.dead_probabilities())
            self._gates.values = self._masks(dead, self._find_threshold(dead))

    def finish(self) -> list[Widths]:
        """The channels that are least dead, up to the budget; weights take over their masks."""
        with torch.no_grad():
            scores = [-p.cpu().double().numpy() for p in self.dead_probabilities()]
        self._gates.fold()
        counts = cut_at_threshold(self._problem.budget, scores, self._problem.rates)[0]
        return [Widths(self._problem.rates[0], counts, sort_channels(scores))]

    def state_dict(self) -> dict[str, Any]:
        """Steps, and which groups an activation follows."""
        return {"steps": self._steps, "is_rectified": self._is_rectified}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        self._steps, self._is_rectified = state["steps"], state["is_rectified"]

    def dead_probabilities(self) -> list[Tensor]:
        """(C,) probability of every group's channels that they answer zero."""
        plan = self._problem.plan
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in plan.groups]
        for norm, axis in self._norms:
            scale, shift = norm.weight, norm.bias
            for g in axis.groups:
                at = torch.as_tensor(axis.group == g)
                channel = torch.as_tensor(axis.channel)[at].to(scale.device)
                zeros = scale.new_zeros(plan.groups[g].num_channels)
                count = zeros.index_add(0, channel, torch.ones_like(scale[at])).clamp(min=1)
                mean = zeros.index_add(0, channel, shift[at]) / count
                variance = zeros.index_add(0, channel, scale[at].square()) / count
                parts[g].append((mean, variance))
        return [self._dead(g, own) for g, own in enumerate(parts)]

    def _dead(self, g: int, parts: list[tuple[Tensor, Tensor]]) -> Tensor:
        group = self._problem.plan.groups[g]
        if self._stays[g]:
            device = next(self._model.parameters()).device
            return torch.full((group.num_channels,), ALIVE, device=device)
        if group.is_residual:
            means, variances = zip(*parts, strict=True)
            parts = [(torch.stack(means).sum(0), torch.stack(variances).sum(0))]
        is_rectified = self._is_rectified[g] if self._is_rectified else True
        # The root of zero has no slope.
        spread = [(mean, variance.clamp(min=1e-12).sqrt()) for mean, variance in parts]
        each = [_zero_probability(mean, deviation, is_rectified) for mean, deviation in spread]
        return torch.stack(each).mean(0)

    def _masks(self, dead: Tensor, threshold: Tensor) -> Tensor:
        low, high = SHARPNESS
        done = min(1.0, self._steps / self._problem.steps)
        slope = low * math.exp(done * math.log(high / low))
        return torch.sigmoid(slope * (threshold - dead))

    def _find_threshold(self, dead: Tensor) -> Tensor:
        """The threshold whose masks cost what the falling budget allows, by bisection."""
        problem = self._problem
        done = min(1.0, self._steps / (FALLING * problem.steps))
        limit = problem.budget.total * (1 - done * (1 - problem.rates[0]))
        least = torch.as_tensor(problem.budget.min_counts)
        low, high = dead.new_tensor(-2.0), dead.new_tensor(3.0)
        for _ in range(30):
            middle = (low + high) / 2
            masks = self._gates.split(self._masks(dead, middle))
            counts = torch.maximum(torch.stack([mask.sum() for mask in masks]).cpu(), least)
            low, high = (middle, high) if expected_cost(problem, counts) <= limit else (low, middle)
        return low


def _zero_probability(mean: Tensor, deviation: Tensor, is_rectified: bool) -> Tensor:
    """Share of a Gaussian that an activation answers with zero, or that is near zero."""
    if is_rectified:
        return normal_cdf(-mean / deviation)
    near = NEAR_ZERO * deviation.detach().mean()
    return normal_cdf((near - mean) / deviation) - normal_cdf((-near - mean) / deviation)


def find_rectified(problem: WidthProblem, model: nn.Module, x: Tensor) -> list[bool]:
    """(G,) whether all layers that read a group's channels read them after an activation."""
    is_rectified = [True] * len(problem.plan.groups)
    hooks: list[RemovableHandle] = []
    for consumer in problem.plan.consumers:
        axis = problem.plan.axes[consumer.weight, 1]

        def look(module: nn.Module, args: tuple[Tensor, ...], axis: Any = axis) -> None:
            dim = args[0].ndim - 1 if isinstance(module, nn.Linear) else 1
            least = args[0].detach().movedim(dim, 0).flatten(1).min(1).values
            for g in axis.groups:
                at = torch.as_tensor(axis.group == g).to(least.device)
                is_rectified[g] &= bool(least[at].min() >= RECTIFIED)

        hooks.append(model.get_submodule(consumer.module).register_forward_pre_hook(look))
    was_training = model.training
    model.eval()
    with torch.no_grad():
        model(x)
    model.train(was_training)
    for hook in hooks:
        hook.remove()
    return is_rectified
