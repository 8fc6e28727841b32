"""What calibration images tell of a network, from one pass: input moments and gate gradients.

Every layer that mixes prunable channels has input moments: mean and covariance of its unfolded
input (`cacp_ray.pruning.patches`). Every channel group has gate gradients: how the loss would
change if a channel were closed at all its readers. Both have float32 precision, so that saving them
(`cacp_ray.pruning.statistics_file`) loses nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cacp_ray.errors import EvaluationError
from cacp_ray.io.environment import give_back_memory
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.calibration import PASSED, Batch, Loss, classify, mean_loss, run_batch
from cacp_ray.pruning.gates import ChannelGates
from cacp_ray.pruning.patches import choose_places, is_product, take_inputs
from cacp_ray.pruning.plan import Consumer, Plan

RIDGE = 1e-4  # noise on each input, as a share of the mean variance
POSITIONS = 64  # rows from each image and layer
SEPARABLE_ABOVE = 4096  # inputs D; a dense float64 covariance of 4096 inputs takes 128 MiB
SOLVABLE = (nn.Conv2d, nn.Linear)  # layers whose input rows are collected


@dataclass(frozen=True)
class InputMoments:
    """Mean and covariance of a layer's unfolded input, D = C * T values, channel by channel.

    T is k * k for a convolution. For a linear layer T is 1, or the number of places where it reads
    a flattened map of one group. In separable form `taps` is not None and
    cov[(c, t), (c', t')] = covariance[c, c'] * taps[t, t'].
    """

    mean: NDArray[np.float64]  # (D,)
    covariance: NDArray[np.float32]  # (D, D); in separable form (C, C), between channels
    taps: NDArray[np.float64] | None = None  # (T, T) with trace T, between taps


@dataclass(frozen=True)
class GateGradients:
    """Derivatives of the loss by a gate m on each channel of a group, over images n.

    The gate multiplies its channel at the input of every layer that mixes it, so that closing the
    gate is cutting the channel: dL_n/dm = sum over layers and places of A * dL_n/dA.
    """

    absolute: NDArray[np.float64]  # (C,) mean of |dL_n/dm|
    square: NDArray[np.float64]  # (C,) mean of (dL_n/dm)^2


@dataclass(frozen=True)
class Statistics:
    """What calibration images tell of a network.

    Attributes:
        inputs: Moments by the weight name of a consumer; empty where not collected. A consumer has
            no entry if it is neither a 2-d convolution nor a linear layer, if its module is never
            called itself (the projection inside `nn.MultiheadAttention`), or if its output is not
            its weight times its input (it pads inside its forward, say).
        gates: Gradients of each group; empty where not collected.
    """

    inputs: dict[str, InputMoments] = field(default_factory=dict[str, InputMoments])
    gates: tuple[GateGradients, ...] = ()


def collect_statistics(
    model: nn.Module,
    plan: Plan,
    batches: Iterable[Batch],
    *,
    seed: int,
    kinds: Iterable[str] = frozenset({"inputs"}),
    loss: Loss = classify,
    positions: int = POSITIONS,
) -> Statistics:
    """Passes examples through the whole network, and backward where `kinds` has `gates`.

    `batches` are of training data only. `loss` serves `gates` alone: the mean over the examples of
    a batch. The network is left in evaluation mode.

    Raises:
        EvaluationError: Activations or gradients overflow or are NaN.
    """
    kinds = frozenset(kinds)
    assert kinds <= {"inputs", "gates"}, kinds
    moments = _Moments(plan, positions, torch.Generator().manual_seed(seed))
    hooks: list[RemovableHandle] = []
    layers = [(model.get_submodule(consumer.module), consumer) for consumer in plan.consumers]
    if "inputs" in kinds:
        hooks += [moments.attach(layer, c) for layer, c in layers if isinstance(layer, SOLVABLE)]
    gates = _Gradients(model, plan) if "gates" in kinds else None
    model.eval()
    try:
        for batch in batches if kinds else ():
            if gates is not None:
                gates.differentiate(model, batch, loss)
            else:
                run_batch(model, batch)
            if len(batch) < PASSED:  # large images leave much behind
                give_back_memory()
    finally:
        for hook in hooks:
            hook.remove()
        if gates is not None:
            gates.remove()
    return Statistics(moments.finish(), () if gates is None else gates.finish())


class _Moments:
    """Input moments of all consumers, batch by batch."""

    def __init__(self, plan: Plan, positions: int, generator: torch.Generator) -> None:
        self._plan = plan
        self._positions = positions
        self._generator = generator
        self._sums: dict[str, _MomentSums] = {}
        self._refused: set[str] = set()  # weights of layers that do not multiply their input

    def attach(self, module: nn.Module, consumer: Consumer) -> RemovableHandle:
        """Records every input of a layer; all its calls pool their rows."""
        axis = self._plan.axes[consumer.weight, 1]

        def record(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            x = args[0].detach()  # any gates are open, and change nothing
            if x.numel() == 0:
                return
            if not is_product(module, x, y.detach()):
                self._refused.add(consumer.weight)
                return
            taps = separable_taps(module, axis)
            # In separable form every tap of a row counts as one.
            positions = max(1, self._positions // (taps or 1))
            rows = take_inputs(module, x, choose_places(module, x, positions, self._generator))
            if consumer.weight not in self._sums:
                self._sums[consumer.weight] = _MomentSums(rows, taps)
            self._sums[consumer.weight].add(rows)

        return module.register_forward_hook(record)

    def finish(self) -> dict[str, InputMoments]:
        """Moments by weight name, in the order of the plan."""
        result: dict[str, InputMoments] = {}
        for consumer in self._plan.consumers:
            if consumer.weight in self._sums and consumer.weight not in self._refused:
                moments = self._sums.pop(consumer.weight).finish()  # large: one at a time
                _check_finite(consumer.module, "inputs", moments.mean, moments.covariance)
                result[consumer.weight] = moments
        return result


def separable_taps(module: nn.Module, axis: Axis) -> int | None:
    """T where the covariance of a layer's input is collected in separable form, else None."""
    if isinstance(module, nn.Conv2d):
        taps = module.weight[0, 0].numel()
    else:
        taps = axis.multiplicity if axis.single_group is not None else 1
    weight = module.weight
    assert isinstance(weight, Tensor)
    return taps if weight[0].numel() > SEPARABLE_ABOVE and taps > 1 else None


class _MomentSums:
    """Sums over the input rows (R, D) of one layer.

    Products are taken in float32 about a first guess of the mean and summed in float64, which is
    fast and keeps the covariance positive. The separable form takes both partial traces of the
    covariance, which determine it if it is a Kronecker product.
    """

    def __init__(self, rows: Tensor, taps: int | None) -> None:
        self._taps = taps
        self._shift = rows.mean(0)
        self._count = 0
        self._total = torch.zeros(rows.shape[1], dtype=torch.float64)
        size = rows.shape[1] // (taps or 1)
        self._between_channels = torch.zeros(size, size, dtype=torch.float64)
        self._between_taps = torch.zeros(taps or 1, taps or 1, dtype=torch.float64)

    def add(self, rows: Tensor) -> None:
        """Adds rows (R, D)."""
        rows = rows - self._shift
        self._count += len(rows)
        self._total += rows.sum(0).double()
        if self._taps is not None:
            by_tap = rows.reshape(-1, self._taps)  # (R * C, T)
            self._between_taps += by_tap.T @ by_tap
            rows = rows.reshape(len(rows), -1, self._taps).transpose(1, 2)
            rows = rows.reshape(-1, rows.shape[2])  # (R * T, C)
        self._between_channels += rows.T @ rows

    def finish(self) -> InputMoments:
        """Mean and covariance, divided by the number of rows."""
        mean = self._total / self._count  # mean of the shifted rows
        taps = self._taps or 1
        by_channel = mean.reshape(-1, taps)  # (C, T)
        covariance = (self._between_channels / self._count - by_channel @ by_channel.T) / taps
        between_taps = None
        if self._taps is not None:
            energy = covariance.diagonal().sum().clamp(min=1e-30)
            between_taps = self._between_taps / self._count - by_channel.T @ by_channel
            between_taps = _rounded(_symmetric(between_taps / energy))
        covariance = _symmetric(covariance.float()).numpy()
        return InputMoments(_rounded(mean + self._shift), covariance, between_taps)


class _Gradients:
    """Gradients by one gate for each image and channel, for all groups at once.

    Source: Group Fisher pruning (Liu et al., ICML 2021, section 3): gradients of coupled layers
    add up before they are squared. The mean of |dL_n/dm| is the first-order Taylor criterion on
    gates (Molchanov et al., 2017, 2019).
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._plan = plan
        self._gates = ChannelGates(model, plan)
        self._absolute = torch.zeros(self._gates.size, dtype=torch.float64)
        self._square = torch.zeros(self._gates.size, dtype=torch.float64)
        self._count = 0
        self.remove = self._gates.remove

    def differentiate(self, model: nn.Module, batch: Batch, loss: Loss) -> None:
        """Adds the gradients on one batch."""
        values = torch.ones(len(batch), self._gates.size, requires_grad=True)
        self._gates.values = values
        with torch.enable_grad():
            total = len(batch) * mean_loss(model, batch, loss)
            # If nothing reads the gates, the loss still has to depend on them.
            total = total + 0 * values.sum()
            gradient = torch.autograd.grad(total, values)[0].double()
        self._absolute += gradient.abs().sum(0)
        self._square += gradient.square().sum(0)
        self._count += len(batch)

    def finish(self) -> tuple[GateGradients, ...]:
        """Gradients of each group; zeros for a group that nothing reads."""
        absolute = self._gates.split(self._absolute / self._count)
        square = self._gates.split(self._square / self._count)
        gradients = [
            GateGradients(_rounded(a), _rounded(s)) for a, s in zip(absolute, square, strict=True)
        ]
        for group, gradient in zip(self._plan.groups, gradients, strict=True):
            _check_finite(group.name, "gradients", gradient.absolute, gradient.square)
        return tuple(gradients)


def _check_finite(layer: str, what: str, *arrays: NDArray[np.floating[Any]]) -> None:
    if not all(np.isfinite(array).all() for array in arrays):
        raise EvaluationError(
            f"{layer}: {what} overflow or are NaN on the calibration images; check that the "
            "weights are those of this network and that images are normalised as in its training"
        )


def _symmetric(matrix: Tensor) -> Tensor:
    return matrix.tril() + matrix.tril(-1).T


def _rounded(values: Tensor) -> NDArray[np.float64]:
    return values.float().double().numpy()


def regularized(covariance: Tensor) -> Tensor:
    """A covariance (D, D) in float64 plus RIDGE of its mean variance, so that it can be factored.

    The ridge acts as noise on every input, and does not depend on the number of calibration images.
    As right-hand sides have it too, it draws a compensated weight towards the cut original one.
    The ridge is ours; CaP has none. A share of 1e-6 to 1e-2 gave the same accuracy within 0.5
    points at 100 to 5,000 images (ResNet-20 and -56, CIFAR-10, all groups at rates 0.3 and 0.5).
    Shrinkage by OAS (Chen et al., 2010, eq. 23) was no better with n the number of rows, and worse
    with n the number of images.
    """
    covariance = covariance.double()
    noise = RIDGE * covariance.diagonal().mean() + 1e-12
    return covariance + noise * torch.eye(len(covariance), dtype=covariance.dtype)
