"""What a method that learns widths is given, and what it answers.

All methods train the whole network behind gates on its channels (`cacp_ray.pruning.gates`), so that
coupled channels are handled by the plan of any network. At the end the widths meet the budget of
each rate exactly, and the channels that are kept are cut out of the trained network.
"""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.criteria.common import is_read
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.surgery import Orders
from cacp_ray.pruning.torch_types import BatchNorm
from cacp_ray.searching.budget import Budget, Ints
from cacp_ray.training.objective import objective
from cacp_ray.training.recipe import Recipe

ROUNDS = 16  # times that a method changes widths in a training, whatever its length


@dataclass(frozen=True)
class WidthProblem:
    """One training that learns widths.

    Attributes:
        plan: How the network may be cut.
        budget: Budget of the run's cost.
        cost: What a rate limits: `macs` or `params`; other costs have no derivative.
        rates: Rates whose widths this training learns, rising.
        orders: Importance order of every group in the network as it was.
        steps: Steps of the training.
        seed: Seed of all that is random.
        start: (G,) widths to begin with, for a method that begins with some; None: uniform ones.
    """

    plan: Plan
    budget: Budget
    cost: str
    rates: tuple[float, ...]
    orders: Orders
    steps: int
    seed: int
    start: Ints | None = None

    def rng(self, number: int) -> np.random.Generator:
        """Source of what is random in one round or step, so that a resumed training repeats it."""
        return np.random.default_rng((self.seed, number))


@dataclass(frozen=True)
class Widths:
    """What was learned for a rate.

    Attributes:
        rate: Share of the cost that is kept.
        keep_counts: (G,) channels kept; their cost is within the budget.
        orders: A permutation of each group's channels, those that are kept first.
    """

    rate: float
    keep_counts: Ints
    orders: Orders


@dataclass(frozen=True)
class TrainingBatch:
    """A batch of a training step, with all that its loss reads; see `objective` for each."""

    model: nn.Module
    x: Tensor
    y: Tensor
    recipe: Recipe
    target: Tensor | None = None
    share: float = 1.0
    other: Any = None

    def loss(self) -> Tensor:
        """The recipe's loss of the network as its gates are now."""
        return objective(
            self.model,
            self.x,
            self.y,
            self.recipe,
            self.target,
            share=self.share,
            other=self.other,
        )


class Method(Protocol):
    """Learns widths while `train_epoch` trains the network."""

    def loss(self, batch: TrainingBatch) -> Tensor:
        """The loss of a batch, in nats."""
        ...

    def after_step(self) -> None:
        """Called after every step of the weights."""
        ...

    def finish(self) -> list[Widths]:
        """The widths of every rate, after the last step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers to go on from, as they are now: the caller copies them."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back a `state_dict`."""
        ...


def check_gated(name: str, problem: WidthProblem) -> None:
    """Refuses groups whose channels no gate closes, as only layers that do not mix them read them.

    Raises:
        ConfigError: The groups, and how to keep them whole.
    """
    prunable = problem.budget.min_counts < problem.budget.num_channels
    open_groups = np.flatnonzero(prunable & ~is_read(problem.plan)).tolist()
    if open_groups:
        names = ", ".join(problem.plan.groups[g].name for g in open_groups[:4])
        raise ConfigError(
            f"strategy {name} has no gates for the channels of {names}"
            f"{' and others' if len(open_groups) > 4 else ''}, which no plain convolution or "
            "linear layer reads: keep them whole (pruning.keep), or choose a strategy that searches"
        )


def check_batch_norms(name: str, problem: WidthProblem, model: nn.Module) -> None:
    """Refuses a network with groups that no BN layer scales.

    Raises:
        ConfigError: The groups without one, and which methods need none.
    """
    scaled = {g for _, axis in batch_norms(problem.plan, model) for g in axis.groups}
    prunable = np.flatnonzero(problem.budget.min_counts < problem.budget.num_channels)
    bare = [problem.plan.groups[g].name for g in prunable.tolist() if g not in scaled]
    if bare:
        raise ConfigError(
            f"strategy {name} reads BN scales, and no BN layer follows {', '.join(bare[:4])}"
            f"{' and others' if len(bare) > 4 else ''}: choose group_fisher, dmcp or "
            "network_adjustment, or keep these whole (pruning.keep)"
        )


def check_derivative(name: str, problem: WidthProblem) -> None:
    """Refuses a cost that `expected_cost` does not know.

    Raises:
        ConfigError: The cost is not MACs or parameters.
    """
    if problem.cost not in ("macs", "params"):
        raise ConfigError(
            f"strategy {name} needs the derivative of the cost: set cost macs or params, or choose "
            "chex, network_adjustment or group_fisher"
        )


def batch_norms(plan: Plan, model: nn.Module) -> list[tuple[BatchNorm, Axis]]:
    """BN layers that scale channels of groups, with the axis that says which."""
    found: list[tuple[BatchNorm, Axis]] = []
    for (name, _), axis in plan.axes.items():
        module = model.get_submodule(name.rpartition(".")[0])
        if name.endswith(".weight") and isinstance(module, BatchNorm):
            found.append((module, axis))
    return found


def sort_channels(scores: Sequence[Any]) -> list[np.ndarray[Any, np.dtype[np.int64]]]:
    """Orders from (C,) scores, higher is better; the first of equals comes first."""
    return [np.argsort(-np.asarray(score, dtype=np.float64), kind="stable") for score in scores]


def prefix_masks(orders: Orders, keep_counts: Ints) -> Tensor:
    """(S,) ones for the first channels of every order, zeros for the others."""
    masks: list[Tensor] = []
    for order, count in zip(orders, keep_counts.tolist(), strict=True):
        mask = torch.zeros(len(order))
        mask[torch.as_tensor(order[:count])] = 1
        masks.append(mask)
    return torch.cat(masks)


def expected_cost(problem: WidthProblem, counts: Tensor) -> Tensor:
    """Cost of expected counts (..., G) of groups that are independent; it has a derivative.

    Source: DMCP (Guo et al., CVPR 2020, eq. 6), for any network: our cost is a sum of products of
    affine functions of the counts (`cacp_ray.pruning.cost`), and so is its expectation, but for a
    layer that reads and makes the same group.
    """
    model = problem.plan.cost_model
    cost = model.params if problem.cost == "params" else model.macs
    left, right = (torch.as_tensor(matrix.T) for matrix in (cost.left, cost.right))
    counts = counts.double()
    made = counts @ left + torch.as_tensor(cost.left_bias)
    read = counts @ right + torch.as_tensor(cost.right_bias)
    return (made * read) @ torch.as_tensor(cost.coefficient)


@contextmanager
def own_statistics(model: nn.Module) -> Generator[None]:
    """Keeps the running statistics of BN layers from what passes inside."""
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
