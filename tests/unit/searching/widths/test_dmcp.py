"""DMCP: chains of probabilities."""

import numpy as np
import pytest
import torch

from cacp_ray.searching.widths.dmcp import BLOCK, DEAD_ZONE, DMCP, FIRST_LOGIT
from cacp_ray.searching.widths.method import TrainingBatch, expected_cost
from cacp_ray.training.objective import objective
from cacp_ray.training.recipe import Recipe
from tests.unit.searching.widths.common import open_small

RECIPE = Recipe(lr=0.1)


def step(dmcp, model, x, y):
    dmcp.loss(TrainingBatch(model.train(), x, y, RECIPE)).backward()
    dmcp.after_step()


def test_a_block_is_kept_with_the_product_of_the_probabilities_up_to_it():
    model, _, problem = open_small("plain")
    dmcp = DMCP(problem, model)
    p = 1 / (1 + np.exp(-FIRST_LOGIT))
    for order, least, marginal in zip(
        problem.orders, problem.budget.min_counts, dmcp._marginals(0), strict=True
    ):
        in_order = marginal.detach().numpy()[order]
        size = max(1, round(BLOCK * len(order)))
        blocks = [0 if i < least else 1 + (i - least) // size for i in range(len(order))]
        assert in_order == pytest.approx([p**block for block in blocks], rel=1e-5)


def test_drawn_widths_have_the_expected_widths_as_their_mean():
    model, _, problem = open_small("plain")
    dmcp = DMCP(problem, model)
    with torch.no_grad():
        dmcp._logits.fill_(0.5)
    rows = []
    for number in range(1500):
        dmcp._steps = number
        rows += dmcp._draw()
    expected = [marginal.sum().item() for marginal in dmcp._marginals(0)]
    assert np.mean(rows, 0) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize(("rate", "way"), [(0.3, -1), (0.95, 1)])
def test_the_cost_moves_probabilities_towards_the_budget(rate, way, monkeypatch):
    model, x, problem = open_small("resnet", rates=(rate,))
    dmcp = DMCP(problem, model)
    dmcp._batch = TrainingBatch(model, x, None, RECIPE)
    nothing = lambda *args, **options: 0 * dmcp._logits.sum()  # noqa: E731
    monkeypatch.setattr(TrainingBatch, "loss", nothing)
    dmcp.after_step()
    moved = dmcp._logits.detach()[0, :, 0] - FIRST_LOGIT
    assert (way * moved > 0).all()


def test_a_cost_within_the_dead_zone_moves_nothing(monkeypatch):
    model, x, problem = open_small("resnet", rates=(0.3,))
    dmcp = DMCP(problem, model)
    spent = expected_cost(problem, torch.stack([m.sum() for m in dmcp._marginals(0)]))
    monkeypatch.setattr(
        type(problem.budget), "limit", lambda self, rate: spent.item() / (0.5 + DEAD_ZONE / 2)
    )
    dmcp._batch = TrainingBatch(model, x, None, RECIPE)
    nothing = lambda *args, **options: 0 * dmcp._logits.sum()  # noqa: E731
    monkeypatch.setattr(TrainingBatch, "loss", nothing)
    dmcp.after_step()
    assert (dmcp._logits == FIRST_LOGIT).all()


def test_whole_network_learns_by_the_recipe_and_narrow_ones_from_it():
    model, x, problem = open_small("plain")
    y = torch.tensor([0, 1])
    dmcp = DMCP(problem, model)
    loss = dmcp.loss(TrainingBatch(model.train(), x, y, RECIPE))
    dmcp._gates.values = None
    assert loss.item() > objective(model.train(), x, y, RECIPE).item()


def test_narrow_passes_leave_the_statistics_of_the_whole_network_alone():
    model, x, problem = open_small("plain")
    other, _, _ = open_small("plain")
    y = torch.tensor([0, 1])
    step(DMCP(problem, model), model, x, y)
    with torch.no_grad():
        other.train()(x)
    for (name, one), two in zip(model.named_buffers(), other.buffers(), strict=True):
        if "running" in name:
            assert torch.allclose(one, two, atol=1e-2), name


def test_each_rate_has_widths_of_its_own():
    model, _, problem = open_small("plain", rates=(0.3, 0.8))
    small, large = DMCP(problem, model).finish()
    assert (small.keep_counts <= large.keep_counts).all()
    assert small.keep_counts.sum() < large.keep_counts.sum()
