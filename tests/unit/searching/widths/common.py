"""Small problems for methods that learn widths."""

import copy

import numpy as np
import torch

from cacp_ray.config.run import PruningConfig
from cacp_ray.data.images import ImageSet
from cacp_ray.pruning.planner import make_plan
from cacp_ray.searching.widths.learning import learn_widths
from cacp_ray.searching.widths.method import WidthProblem
from cacp_ray.searching.widths.table import make_method
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.setup import make_budget
from tests.unit.pruning.networks import make


def problem_of(model, x, rates=(0.5,), steps=200, keep=(), **others):
    plan = make_plan(model, x[:1])
    orders = [np.random.default_rng(1).permutation(g.num_channels) for g in plan.groups]
    budget = make_budget(plan, "macs", PruningConfig(keep=keep))
    values = {"cost": "macs", "rates": rates, "orders": orders, "steps": steps, "seed": 0} | others
    return WidthProblem(plan=plan, budget=budget, **values)


def open_small(name, rates=(0.5,), steps=200, **others):
    """A small network, an input, and its problem."""
    model, x = make(name)
    return model, x, problem_of(model, x, rates, steps, **others)


def images_of(count, side, seed=0):
    """Images of five classes that differ in colour."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 5
    images = rng.normal(120, 20, (count, side, side, 3)) + 20 * np.eye(5)[labels][:, None, None, :3]
    classes = tuple("abcde")
    return ImageSet(images.clip(0, 255).astype(np.uint8), labels, classes, (0.5,) * 3, (0.2,) * 3)


def learn(name, network, *, rates=(0.5,), epochs=2, count=128, state=None, states=None, **recipe):
    """Trains a small network while a method learns its widths; returns the last state.

    `states` collects a copy of what every epoch left.
    """
    model, x = make(network)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    settings = Recipe(**{"epochs": epochs, "batch_size": 16, "lr": 0.02, "padding": 1} | recipe)
    images = images_of(count, x.shape[-1])
    steps = epochs * -(-count // settings.batch_size)
    problem = problem_of(model, x, rates, steps)
    kept = [] if states is None else states
    learn_widths(
        model,
        lambda: make_method(name, problem, model),
        images,
        images_of(20, x.shape[-1], seed=1),
        settings,
        state=state,
        on_epoch=lambda result, training: kept.append(copy.deepcopy(training)),
    )
    return model, problem, kept


def equal_states(one, other):
    """Whether two nested states hold the same bits."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_states(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal_states, one, other))
    return one == other
