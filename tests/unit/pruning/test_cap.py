"""CaP against its definition, and its laws."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.errors import EvaluationError
from cacp_ray.pruning.criteria import cap, rank_channels
from cacp_ray.pruning.criteria import score_channels as score
from cacp_ray.pruning.statistics import (
    RIDGE,
    InputMoments,
    Statistics,
    regularized,
)
from tests.unit.pruning.test_criteria import invent, load


def greedy(layers, num_channels):
    """Greedy selection by definition: a least-squares fit for every candidate at every step.

    Args:
        layers: For every consumer: a square root R of its input covariance R^T R (any data with
            that covariance would do), the weight (N, D), the channel of each of the D inputs (-1
            outside the group), and the energy of its whole output.
        num_channels: Channels of the group.

    Returns:
        The order, and the share of energy that is explained after each choice.
    """

    def explained(channels):
        total = 0.0
        for root, weight, channel, energy in layers:
            target = root[:, channel >= 0] @ weight[:, channel >= 0].T
            design = root[:, np.isin(channel, channels)]
            fit = design @ np.linalg.lstsq(design, target, rcond=None)[0]
            total += np.square(fit).sum() / energy
        return total

    chosen = []
    while len(chosen) < num_channels:
        rest = [c for c in range(num_channels) if c not in chosen]
        chosen.append(max(rest, key=lambda c: explained([*chosen, c])))
    return chosen, [explained(chosen[:n]) for n in range(num_channels + 1)]


def root_of(covariance):
    return np.linalg.cholesky(covariance).T


def definition_of(plan, tensors, statistics, group):
    """The result of `greedy` for one group."""
    layers = []
    for consumer in plan.consumers:
        axis = plan.axes[consumer.weight, 1]
        weight = tensors[consumer.weight].double().flatten(1).numpy()
        channel = np.repeat(
            np.where(axis.group == group, axis.channel, -1), weight.shape[1] // len(axis.group)
        )
        if (channel < 0).all():
            continue
        covariance = torch.from_numpy(statistics.inputs[consumer.weight].covariance)
        energy = np.square(root_of(regularized(covariance).numpy()) @ weight.T).sum()
        own = channel >= 0
        part = regularized(covariance[own][:, own]).numpy()
        layers.append((root_of(part), weight[:, own], channel[own], energy))
    return len(layers), greedy(layers, plan.groups[group].num_channels)


@pytest.mark.parametrize(
    ("network", "group", "num_consumers"),
    [
        ("concat", "left", 1),  # half of the inputs of a 3x3 convolution
        ("concat", "mix", 1),  # a map flattened into a linear layer: nine inputs a channel
        ("depthwise", "expand", 2),  # a 1x1 convolution and the squeeze layer of its SE gate
        ("resnet", "conv1", 3),  # a residual stream that 3x3 and 1x1 convolutions read
        ("mobile", "project.0", 1),
    ],
)
@pytest.mark.parametrize("step", [1, 12, 72])
def test_cap_is_greedy_least_squares_selection(network, group, num_consumers, step, monkeypatch):
    monkeypatch.setattr(cap, "STEP", step)
    _, plan, tensors, _ = load(network)
    g = [each.name for each in plan.groups].index(group)
    statistics = invent(plan, tensors, seed=g)
    count, (order, explained) = definition_of(plan, tensors, statistics, g)
    assert count == num_consumers
    scores = score("cap", plan, tensors, statistics, 0)[g]
    assert np.argsort(-scores, kind="stable").tolist() == order
    unexplained = explained[-1] - np.array(explained[:-1])  # when each channel is chosen
    assert np.allclose(scores[order], unexplained, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(("network", "group", "taps"), [("resnet", 1, 9), ("concat", 2, 9)])
def test_cap_of_a_separable_covariance_is_that_of_the_kronecker_product(network, group, taps):
    _, plan, tensors, _ = load(network)  # a 3x3 convolution; a map flattened into a linear layer
    rng = np.random.default_rng(5)
    num_channels = plan.groups[group].num_channels
    between, among = (
        data.T @ data / len(data)
        for size in (num_channels, taps)
        for data in [rng.normal(size=(3 * size, size)) @ rng.normal(size=(size, size))]
    )
    [name] = [c.weight for c in plan.consumers if (plan.axes[c.weight, 1].group == group).all()]
    weight = tensors[name].double().flatten(1).numpy()
    whole = np.kron(regularized(torch.from_numpy(between)).numpy(), among)
    root = root_of(whole)
    energy = np.square(root @ weight.T).sum()
    channel = np.repeat(np.arange(num_channels), taps)
    order, explained = greedy([(root, weight, channel, energy)], num_channels)
    statistics = Statistics({name: InputMoments(np.zeros(len(whole)), between, among)})
    scores = score("cap", plan, tensors, statistics, 0)[group]
    assert np.argsort(-scores, kind="stable").tolist() == order
    assert np.allclose(scores[order], 1 - np.array(explained[:-1]), rtol=1e-6, atol=1e-8)


@settings(max_examples=10, deadline=None)
@given(st.floats(0.1, 10), st.floats(0.1, 10), st.integers(0, 10**6))
def test_cap_ignores_the_units_of_inputs_and_outputs_and_rotations_of_outputs(a, b, seed):
    _, plan, tensors, _ = load("depthwise")
    statistics = invent(plan, tensors)
    rotate = np.linalg.qr(np.random.default_rng(seed).normal(size=(8, 8)))[0]
    weight = tensors["project.weight"].double()
    other = tensors | {
        "project.weight": torch.tensordot(torch.from_numpy(rotate), weight, 1) * a,
        "squeeze.weight": tensors["squeeze.weight"].double() * a,
    }
    scaled = {
        name: InputMoments(m.mean, m.covariance * b**2) for name, m in statistics.inputs.items()
    }
    before = score("cap", plan, tensors, statistics, 0)
    after = score("cap", plan, other, Statistics(scaled), 0)
    for one, two in zip(before, after, strict=True):
        assert np.allclose(one, two, rtol=1e-4, atol=1e-6)


def test_cap_scores_fall_strictly_and_start_at_the_number_of_consumers():
    _, plan, tensors, _ = load("resnet")
    statistics = invent(plan, tensors)
    scores = score("cap", plan, tensors, statistics, 0)
    for g, values in enumerate(scores):
        readers = [c for c in plan.consumers if (plan.axes[c.weight, 1].group == g).any()]
        assert values.max() == pytest.approx(len(readers))
        assert (np.diff(np.sort(values)) > 0).all()


def test_cap_takes_a_channel_that_repeats_another_last():
    _, plan, tensors, _ = load("plain")
    statistics = invent(plan, tensors)
    rows = np.arange(12 * 9)
    rows[5 * 9 : 6 * 9] = rows[2 * 9 : 3 * 9]  # channel 5 is channel 2
    old = statistics.inputs["6.weight"]
    statistics.inputs["6.weight"] = InputMoments(old.mean, old.covariance[np.ix_(rows, rows)])
    order = rank_channels("cap", plan, tensors, statistics, 0)[1]
    assert order[-1] in (2, 5)


@pytest.mark.parametrize("size", [0.003, 0.03])
def test_cap_survives_a_covariance_that_rounding_made_indefinite(size):
    _, plan, tensors, _ = load("plain")
    statistics = invent(plan, tensors)
    rng = np.random.default_rng(0)
    data = rng.normal(size=(4, 108))  # rank 4, so that noise decides in the other directions
    noise = rng.normal(size=(108, 108)) * size
    covariance = data.T @ data / 4 + noise + noise.T
    assert np.linalg.eigvalsh(covariance)[0] < -20 * RIDGE
    statistics.inputs["6.weight"] = InputMoments(np.zeros(108), covariance)
    scores = score("cap", plan, tensors, statistics, 0)[1]
    assert len(np.unique(scores)) == 12
    assert scores.min() > 0
    assert 0.9 < scores.max() < 1.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_cap_refuses_moments_that_are_not_finite(value):
    _, plan, tensors, _ = load("plain")
    statistics = invent(plan, tensors)
    statistics.inputs["6.weight"].covariance[3, 3] = value
    with pytest.raises(EvaluationError, match="covariance"):
        score("cap", plan, tensors, statistics, 0)


def test_cap_scores_fall_strictly_and_put_channels_that_nothing_uses_last():
    _, plan, tensors, _ = load("plain")
    weight = tensors["6.weight"].clone()
    weight[:, [1, 4, 7]] = 0
    statistics = invent(plan, tensors)
    blocks = np.kron(np.eye(12), np.ones((9, 9)))  # channels do not predict each other
    old = statistics.inputs["6.weight"]
    statistics.inputs["6.weight"] = InputMoments(old.mean, old.covariance * blocks)
    scores = score("cap", plan, tensors | {"6.weight": weight}, statistics, 0)[1]
    assert len(np.unique(scores)) == 12
    assert set(np.argsort(scores)[:3].tolist()) == {1, 4, 7}


def test_cap_is_l1_in_a_network_where_no_layer_can_be_measured():
    _, plan, tensors, _ = load("decoder")
    plan = replace(plan, consumers=())
    orders = rank_channels("cap", plan, tensors, Statistics(), 0)
    l1 = rank_channels("l1", plan, tensors, Statistics(), 0)
    assert all((order == other).all() for order, other in zip(orders, l1, strict=True))


def test_cap_order_of_a_group_that_no_measured_layer_reads_is_l1():
    _, plan, tensors, _ = load("decoder")
    statistics = invent(plan, tensors)
    assert list(statistics.inputs) == ["head.weight"]
    orders = rank_channels("cap", plan, tensors, statistics, 0)
    l1 = rank_channels("l1", plan, tensors, Statistics(), 0)
    for group, order, other in zip(plan.groups, orders, l1, strict=True):
        assert (group.name == "up_bias") or (order == other).all()
