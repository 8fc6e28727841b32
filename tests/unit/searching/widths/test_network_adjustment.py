"""Network Adjustment: channels move to where they are needed."""

import numpy as np
import torch

from cacp_ray.searching.budget import uniform
from cacp_ray.searching.widths.method import TrainingBatch
from cacp_ray.searching.widths.network_adjustment import NetworkAdjustment
from cacp_ray.training.recipe import Recipe
from tests.unit.searching.widths.common import open_small


def begin(steps=18, rates=(0.5,), **others):
    model, x, problem = open_small("resnet", rates, steps, **others)
    return model, torch.randn(16, *x.shape[1:]), torch.arange(16) % 10, problem


def test_it_begins_with_uniform_widths_or_with_those_of_a_subnet():
    _, _, _, problem = begin()
    ones = np.ones(len(problem.plan.groups))
    model, *_ = begin()
    widths = NetworkAdjustment(problem, model).finish()[0].keep_counts
    assert (widths == uniform(problem.budget, [0.5], ones)[0]).all()
    start = widths.copy()
    start[1] -= 1
    model, _, _, problem = begin(start=start)
    found = NetworkAdjustment(problem, model).finish()[0].keep_counts
    assert np.abs(found - start).sum() <= 1  # what the start leaves of the budget is spent


def test_a_group_that_nobody_needs_is_narrowed():
    model, x, y, problem = begin()
    useless = next(g for g, group in enumerate(problem.plan.groups) if not group.is_residual)
    name = problem.plan.groups[useless].name
    reader = name.replace("conv1", "conv2")
    with torch.no_grad():
        model.get_submodule(reader).weight.zero_()  # reads nothing of that group
    adjustment = NetworkAdjustment(problem, model)
    before = adjustment.finish()[0].keep_counts
    for _ in range(problem.steps):
        adjustment.loss(TrainingBatch(model.train(), x, y, Recipe(lr=0.1)))
        adjustment.after_step()
    after = adjustment.finish()[0].keep_counts
    assert after[useless] < before[useless]
    assert problem.budget.cost(after) <= problem.budget.limit(0.5)


def test_no_probe_remains_in_the_network():
    model, x, y, problem = begin()
    adjustment = NetworkAdjustment(problem, model)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    adjustment._batch = TrainingBatch(model, x, y, Recipe(lr=0.1))
    adjustment._play_round()
    assert model.training
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    values = adjustment._gates.values
    assert values.ndim == 1
    assert set(values.tolist()) == {0.0, 1.0}
    assert values.sum() == adjustment.finish()[0].keep_counts.sum()


def test_equal_cost_is_dropped_in_every_group():
    model, x, y, problem = begin()
    adjustment = NetworkAdjustment(problem, model)
    adjustment._batch = TrainingBatch(model, x, y, Recipe(lr=0.1))
    seen = []
    masks = adjustment._gates.split(adjustment._gates.values)
    hook = model.register_forward_pre_hook(
        lambda module, args: seen.append(adjustment._gates.values)
    )
    movable = np.arange(len(masks))
    adjustment._measure_use(movable)
    hook.remove()
    counts, budget = adjustment.finish()[0].keep_counts, problem.budget
    dropped = []
    for group in movable:
        own = [v for v in seen if v.ndim == 2][2 * group : 2 * group + 2]
        share = np.mean([
            1 - (adjustment._gates.split(v.T)[group][masks[group] > 0] > 0).float().mean().item()
            for v in own
        ])  # fmt: skip
        less = counts - np.eye(len(counts), dtype=np.int64)[group]
        dropped.append(share * (budget.cost(counts) - budget.cost(less)) * counts[group])
    assert np.std(dropped) / np.mean(dropped) < 0.5  # few images, few channels
