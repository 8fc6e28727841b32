"""Group Fisher pruning: one channel after another."""

import numpy as np
import pytest
import torch

from cacp_ray.searching.widths.group_fisher import DELETING, GroupFisher
from cacp_ray.searching.widths.method import TrainingBatch
from cacp_ray.training.objective import objective
from cacp_ray.training.recipe import Recipe
from tests.unit.searching.widths.common import open_small

RECIPE = Recipe(lr=0.1, label_smoothing=0.0)


def begin(name="plain", steps=160, rates=(0.5,)):
    model, x, problem = open_small(name, rates, steps)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model, x, problem


def test_sums_are_squares_of_each_image_s_derivative():
    model, x, problem = begin()
    y = torch.tensor([1, 3])
    fisher = GroupFisher(problem, model)
    fisher.loss(TrainingBatch(model.eval(), x, y, RECIPE)).backward()
    fisher.after_step()
    expected = torch.zeros(fisher._gates.size, dtype=torch.float64)
    for image, label in zip(x, y, strict=True):
        values = torch.ones(fisher._gates.size, requires_grad=True)
        fisher._gates.values = values
        loss = objective(model, image[None], label[None], RECIPE)
        expected += torch.autograd.grad(loss, values)[0].double().square()
    assert fisher.state_dict()["sums"].numpy() == pytest.approx(expected.numpy(), rel=1e-3)


def test_the_least_sum_for_the_cost_that_it_frees_goes_first():
    model, _, problem = begin()
    fisher = GroupFisher(problem, model)
    fisher._sums.fill_(1.0)
    sizes = [group.num_channels for group in problem.plan.groups]
    fisher._sums[sum(sizes[:1]) + 2] = 1e-6  # channel 2 of the second group
    fisher._steps = 1
    fisher._delete(done=1e-6)  # one channel is enough
    assert fisher.state_dict()["deleted"].tolist() == [sizes[0] + 2]


def test_freed_costs_follow_the_deletions():
    model, _, problem = begin(rates=(0.3,))
    fisher = GroupFisher(problem, model)
    fisher._sums.fill_(1.0)
    fisher._delete(done=1.0)
    deleted = fisher.state_dict()["deleted"].tolist()
    group = np.repeat(np.arange(3), [g.num_channels for g in problem.plan.groups])[deleted]
    counts, budget = problem.budget.num_channels.copy(), problem.budget
    for g in group:  # with equal sums, always the dearest channel of the network as it is then
        freed = budget.cost(counts) - budget.cost(counts - np.eye(3, dtype=np.int64))
        freed = np.where(counts > budget.min_counts, freed, 0)
        assert freed[g] == freed.max()
        counts[g] -= 1


def test_the_cost_falls_in_equal_steps_and_reaches_the_rate_before_the_end():
    model, x, problem = begin("resnet", steps=40, rates=(0.4,))
    y = torch.tensor([1, 3])
    fisher = GroupFisher(problem, model)
    costs = []
    for _ in range(problem.steps):
        fisher.loss(TrainingBatch(model.train(), x, y, RECIPE)).backward()
        fisher.after_step()
        parts = fisher._gates.split(fisher._mask)
        counts = np.array([int(part.sum()) for part in parts])
        costs.append(int(problem.budget.cost(counts)) / problem.budget.total)
    done = np.minimum(1, np.arange(1, 41) / (DELETING * 40))
    channel = 0.02  # a channel frees at most as much
    assert np.abs(np.array(costs) - (1 - 0.6 * done)).max() < 0.6 / 16 + channel
    assert costs[int(DELETING * 40)] <= 0.4


def test_the_channel_deleted_last_comes_back_first():
    model, _, problem = begin()
    fisher = GroupFisher(problem, model)
    fisher._sums.copy_(torch.arange(len(fisher._sums), 0, -1))
    widths = fisher.finish()[0]
    deleted = fisher.state_dict()["deleted"].tolist()
    start = 0
    for order, group in zip(widths.orders, problem.plan.groups, strict=True):
        own = [c - start for c in deleted if start <= c < start + group.num_channels]
        assert order.tolist()[group.num_channels - len(own) :] == own[::-1]
        start += group.num_channels
