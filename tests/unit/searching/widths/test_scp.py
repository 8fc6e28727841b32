"""SCP: dead channels by their BN layer."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import norm

from cacp_ray.searching.widths.method import TrainingBatch, expected_cost
from cacp_ray.searching.widths.scp import SCP, find_rectified
from cacp_ray.training.objective import objective
from cacp_ray.training.recipe import Recipe
from tests.unit.searching.widths.common import open_small


def test_a_channel_is_dead_with_the_gaussian_s_share_below_zero():
    model, _, problem = open_small("plain")
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([1.0, 2, -1, 1, 1, 1, 1, 1]))
        model[1].bias.copy_(torch.tensor([0.0, 2, 1, -2, 5, 1, 1, 1]))
    dead = SCP(problem, model).dead_probabilities()[0].detach().numpy()
    expected = [0.5, norm.cdf(-1), norm.cdf(-1), norm.cdf(2), norm.cdf(-5)]
    assert dead[:5] == pytest.approx(expected, abs=1e-6)


def test_a_residual_stream_is_the_sum_of_its_layers():
    model, _, problem = open_small("resnet")
    stream = next(g for g, group in enumerate(problem.plan.groups) if group.is_residual)
    norms = [
        model.get_submodule(layer.replace("conv", "bn"))
        for layer in problem.plan.groups[stream].producers
    ]
    mean = sum(n.bias.detach().numpy() for n in norms)
    deviation = np.sqrt(sum(n.weight.detach().numpy() ** 2 for n in norms))
    dead = SCP(problem, model).dead_probabilities()[stream].detach().numpy()
    assert dead == pytest.approx(norm.cdf(-mean / deviation), abs=1e-5)


def test_channels_that_no_activation_follows_are_dead_near_zero():
    model, x, problem = open_small("resnet")
    rectified = find_rectified(problem, model, x)
    assert all(rectified)  # CIFAR ResNets have a ReLU after every sum
    scp = SCP(problem, model)
    scp._is_rectified = [False] * len(rectified)
    with torch.no_grad():
        inner = next(g for g, group in enumerate(problem.plan.groups) if not group.is_residual)
        layer = model.get_submodule(problem.plan.groups[inner].name.replace("conv", "bn"))
        layer.weight.fill_(1.0)
        layer.bias.copy_(torch.linspace(-3, 3, len(layer.bias)))
    dead = scp.dead_probabilities()[inner].detach().numpy()
    middle = len(dead) // 2
    assert dead.argmax() in (middle - 1, middle)
    assert dead[0] == pytest.approx(dead[-1], abs=1e-5)


def test_linear_outputs_are_not_taken_for_rectified():
    model, x, problem = open_small("depthwise")
    by_name = dict(
        zip(
            (group.name for group in problem.plan.groups),
            find_rectified(problem, model, x),
            strict=True,
        )
    )
    assert by_name["expand"]
    assert not by_name["stem"]  # the sum goes into the next layers as it is


def test_masks_cost_what_the_falling_budget_allows():
    model, x, problem = open_small("resnet", rates=(0.4,), steps=90)
    y = torch.tensor([0, 1])
    scp = SCP(problem, model)
    costs = []
    for _ in range(60):
        scp.loss(TrainingBatch(model.train(), x, y, Recipe(lr=0.1)))
        masks = scp._gates.split(scp._gates.values.detach())
        least = torch.as_tensor(problem.budget.min_counts)
        counts = torch.maximum(torch.stack([mask.sum() for mask in masks]), least)
        costs.append(float(expected_cost(problem, counts)) / problem.budget.total)
        scp._steps += 1
    assert costs[0] > 0.95
    assert costs[-1] == pytest.approx(0.4, abs=0.02)
    assert all(later <= earlier + 1e-6 for earlier, later in pairwise(costs))


def test_the_loss_draws_channels_towards_death():
    model, x, problem = open_small("plain")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    scp = SCP(problem, model)
    y = torch.tensor([0, 1])
    recipe = Recipe(lr=0.1)
    loss = scp.loss(TrainingBatch(model.eval(), x, y, recipe))
    term = loss - objective(model, x, y, recipe)
    (slope,) = torch.autograd.grad(term, [model[1].bias])
    assert (slope > 0).all()  # a step against it lowers the bias


@pytest.mark.parametrize("scale", [0.0, 1e-24])
def test_a_scale_of_zero_has_a_finite_slope(scale):
    model, x, problem = open_small("plain")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    with torch.no_grad():
        model[1].weight[0] = scale
    SCP(problem, model).loss(
        TrainingBatch(model.train(), x, torch.tensor([0, 1]), Recipe(lr=0.1))
    ).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
