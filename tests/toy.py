"""A toy problem for tests: the cost model of a small chain CNN, and accuracy as a formula."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.pruning.cost import BilinearCost, ChannelGroup, CostModel
from cacp_ray.pruning.latency_cost import (
    Calibration,
    Grid,
    Layer,
    LayerShape,
    make_latency_cost,
)
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.strategies.problem import Scores
from tests.small import measurement_of

NUM_CLASSES = 10


def toy_cost_model(num_groups: int = 8, seed: int = 0) -> CostModel:
    """Cost model of a chain of 3x3 convolutions, whose outputs are the groups, and a classifier.

    Image side 32, halved after every third convolution; widths are random multiples of 4.
    """
    rng = np.random.default_rng(seed)
    widths = 4 * rng.integers(3, 10, size=num_groups)
    stages = np.arange(num_groups) // 3
    sides = np.maximum(32 // 2 ** np.minimum(stages, 3), 4)
    groups = tuple(
        ChannelGroup(
            name=f"conv{i}",
            producers=(f"conv{i}",),
            members=(f"conv{i}.weight:0", f"bn{i}.weight:0"),
            num_channels=int(widths[i]),
            is_residual=i % 3 == 0,
            in_channels=3 if i == 0 else int(widths[i - 1]),
            kernel=3,
            stride=2 if i > 0 and stages[i] != stages[i - 1] else 1,
            height=int(sides[i]),
            width=int(sides[i]),
        )
        for i in range(num_groups)
    )
    inputs = np.eye(num_groups + 1, num_groups, k=-1)  # (T, G): row t reads group t - 1
    outputs = np.eye(num_groups + 1, num_groups)
    input_bias = np.where(np.arange(num_groups + 1) == 0, 3.0, 0.0)
    output_bias = np.where(np.arange(num_groups + 1) == num_groups, float(NUM_CLASSES), 0.0)
    weights = np.full(num_groups + 1, 9.0)
    weights[-1] = 1.0
    macs = weights * np.append(sides.astype(float) ** 2, 1.0)
    params = BilinearCost(weights, inputs, input_bias, outputs, output_bias)
    # Two more parameters for each channel (BN) and one for each class (bias of the classifier).
    extra = np.vstack([outputs[:-1], np.zeros((1, num_groups))])
    extra_bias = np.append(np.zeros(num_groups), float(NUM_CLASSES))
    return CostModel(
        groups=groups,
        macs=BilinearCost(macs, inputs, input_bias, outputs, output_bias),
        params=BilinearCost(
            np.concatenate([params.coefficient, np.full(num_groups, 2.0), [1.0]]),
            np.vstack([inputs, extra]),
            np.concatenate([input_bias, extra_bias]),
            np.vstack([outputs, np.zeros((num_groups + 1, num_groups))]),
            np.concatenate([output_bias, np.ones(num_groups + 1)]),
        ),
    )


def toy_layers(cost_model: CostModel) -> tuple[Layer, ...]:
    """The layers of the chain, each with a shape of its own."""
    macs, one = cost_model.macs, (1, 1)
    return tuple(
        Layer(
            LayerShape("conv", (3, 3), one, one, one, 1, one, False, True, 8 + t, 8),
            macs.left[t],
            float(macs.left_bias[t]),
            macs.right[t],
            float(macs.right_bias[t]),
        )
        for t in range(len(macs.coefficient))
    )


def with_toy_latency(cost_model: CostModel, seed: int = 0) -> CostModel:
    """The cost model with a noisy table of its layers, at widths unrelated to the keep counts."""
    rng = np.random.default_rng(seed)
    layers = toy_layers(cost_model)
    grids = {}
    for layer in layers:
        inputs, outputs = (np.unique(rng.integers(1, 41, size)) for size in (5, 7))
        times = 100 * outputs[:, None] * inputs * rng.lognormal(0, 0.5, (len(outputs), len(inputs)))
        grids[layer.shape] = Grid(inputs, outputs, 1000 + times)
    latency = make_latency_cost(layers, grids, Calibration(5000.0, 1.3))
    return dataclasses.replace(cost_model, layers=layers, latency=latency)


def toy_score(cost_model: CostModel, seed: int = 0) -> Callable[[tuple[int, ...]], float]:
    """Accuracy 1 - sum_g w_g (1 - K_g / n_g)^2; the sensitivities w_g span a factor of 30."""
    rng = np.random.default_rng(seed + 1)
    num_channels = cost_model.num_channels
    sensitivities = np.exp(rng.uniform(0, np.log(30), size=len(num_channels)))
    sensitivities /= sensitivities.sum()

    def score(keep_counts: tuple[int, ...]) -> float:
        dropped = 1 - np.asarray(keep_counts) / num_channels
        return float(1 - sensitivities @ dropped**2)

    return score


def toy_scores(cost_model: CostModel) -> Callable[[str], Scores]:
    """Gives falling scores of every group for a criterion; the groups differ in scale."""

    def scores(criterion: str) -> Scores:
        rng = np.random.default_rng(list(criterion.encode()))
        return [
            rng.uniform(0.7, 1.3) * np.sort(rng.random(group.num_channels))[::-1]
            for group in cost_model.groups
        ]

    return scores


def toy_problem(
    seed: int, num_groups: int = 8
) -> tuple[AllocationMDP, Callable[[tuple[int, ...]], float]]:
    """The MDP of a toy network with a uniform prior, and its accuracy."""
    cost_model = toy_cost_model(num_groups, seed)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    return AllocationMDP(cost_model, budget, uniform_prior(num_groups), 0.8), toy_score(
        cost_model, seed
    )


def five_group_problem(
    seed: int, rates: Sequence[float]
) -> tuple[AllocationMDP, Callable[[tuple[int, ...]], float], NDArray[np.float64]]:
    """An MDP with at most nine legal counts a group, its accuracy, and the optimum of each rate."""
    cost_model = toy_cost_model(5, seed)
    score, channels = toy_score(cost_model, seed), cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 4), round_to=4)
    allocations = every_allocation(budget)
    accuracies = np.array([score(tuple(counts)) for counts in allocations])
    costs = budget.cost(allocations)
    optima = np.array([accuracies[costs <= limit].max() for limit in budget.limit(rates)])
    return AllocationMDP(cost_model, budget, uniform_prior(5), 0.8), score, optima


def measure_by_formula(
    proposals: Sequence[Candidate],
    score: Callable[[tuple[int, ...]], float],
    first: int = 0,
    status: Literal["ok", "failed"] = "ok",
) -> list[tuple[Candidate, Measurement]]:
    """Results for a strategy's proposals, which are numbered from `first` on."""
    results: list[tuple[Candidate, Measurement]] = []
    for i, proposal in enumerate(proposals, start=first):
        top1 = score(proposal.keep_counts)
        candidate = Candidate(
            proposal.rate, proposal.keep_counts, criterion=proposal.criterion, index=i
        )
        results.append((candidate, measurement_of(i, top1, 0.0, 1 - top1, 1000, 0.0, status)))
    return results


def every_allocation(budget: Budget) -> NDArray[np.int64]:
    """(N, G) all legal keep counts within the minimum and maximum of each group."""
    levels = [
        [
            count
            for count in range(least, whole + 1)
            if count % budget.round_to == 0 or count == whole
        ]
        for least, whole in zip(budget.min_counts, budget.num_channels, strict=True)
    ]
    return np.stack(np.meshgrid(*levels, indexing="ij"), axis=-1).reshape(-1, len(levels))
