"""Latency as a cost: the sum of measured layers, monotone in every keep count.

Each layer of the network was timed alone at a grid of widths (`cacp_ray.evaluation.latency_table`).
Between the widths of a grid its time is interpolated bilinearly, in whole numbers, so that it never
falls when a width grows. A calibration adds what a network spends outside its layers (sums,
activations, pools, calls) and saves where a runtime joins them: latency = constant + scale * layers
+ per_mac * multiply-accumulates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Pair = tuple[int, int]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class LayerShape:
    """All that the time of a layer depends on, apart from its numbers of channels."""

    kind: str  # `conv` or `linear`
    kernel: Pair  # (height, width), (1, 1) for linear
    stride: Pair  # (rows, columns), (1, 1) for linear
    padding: Pair  # (rows, columns), (0, 0) for linear
    dilation: Pair  # (rows, columns), (1, 1) for linear
    groups: int  # parts that all keep the same lanes; 0 where parts stay or go whole (depthwise)
    part: Pair  # inputs and outputs of a part where `groups` is 0, else (1, 1)
    bias: bool  # whether the layer adds a bias
    batch_norm: bool  # whether a batch norm alone takes its output; it is timed with the layer
    height: int  # rows of the input; rows of the matrix for linear
    width: int  # columns of the input, 1 for linear

    def macs_of_a_pair(self) -> float:
        """Multiply-accumulates of one input channel with one output channel.

        Where parts stay or go whole, the inputs count as one channel.
        """
        if self.kind == "linear":
            return float(self.height)
        places = 1.0
        sides = zip((self.height, self.width), self.kernel, self.stride, self.padding,
                    self.dilation, strict=True)  # fmt: skip
        for size, kernel, stride, padding, dilation in sides:
            places *= kernel * ((size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1)
        return places * (self.part[0] if self.groups == 0 else 1)

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        kernel, stride = "x".join(map(str, self.kernel)), max(self.stride)
        parts = {1: "", 0: " depthwise"}.get(self.groups, f" of {self.groups} groups")
        return f"conv {kernel}{parts} stride {stride} on {self.height}x{self.width}"


@dataclass(frozen=True)
class Layer:
    """One use of a layer in a network; its widths are affine in the keep counts K."""

    shape: LayerShape  # what its time depends on, apart from the widths
    inputs: Floats  # (G,) slope of C_in, of one part where shape.groups > 1; unused where it is 0
    input_bias: float  # intercept of C_in
    outputs: Floats  # (G,) slope of C_out
    output_bias: float  # intercept of C_out


@dataclass(frozen=True)
class Grid:
    """Times of one layer shape."""

    inputs: Ints  # (P,) widths, rising
    outputs: Ints  # (Q,) widths, rising
    nanoseconds: Floats  # (Q, P) measured times


@dataclass(frozen=True)
class Calibration:
    """What turns the sum of the layers into the latency of a network; nothing is negative."""

    constant: float = 0.0  # nanoseconds that every network takes
    scale: float = 1.0  # factor on the sum of the layers
    per_mac: float = 0.0  # nanoseconds of a multiply-accumulate beyond that


def monotone(times: ArrayLike) -> Ints:
    """Whole numbers that rise both ways, with the smallest largest distance to `times` (Q, P).

    A measured table is a noisy staircase: widths that the kernels like are faster than smaller
    ones. The surface lies halfway between the running maximum from the smallest widths and the
    running minimum from the largest.
    """
    above = np.asarray(times, dtype=np.float64)
    below = above[::-1, ::-1]
    for axis in (0, 1):
        above = np.maximum.accumulate(above, axis=axis)
        below = np.minimum.accumulate(below, axis=axis)
    return np.rint((above + below[::-1, ::-1]) / 2).astype(np.int64)


@dataclass(frozen=True)
class LatencyCost:
    """Nanoseconds of keep counts, which never fall when a count grows."""

    inputs: Floats  # (T, G) slopes of C_in of T layers
    input_bias: Floats  # (T,) intercepts of C_in
    outputs: Floats  # (T, G) slopes of C_out
    output_bias: Floats  # (T,) intercepts of C_out
    grid_of: Ints  # (T,) index of each layer's grid
    input_nodes: Ints  # (S, P) input widths of S grids, rising
    output_nodes: Ints  # (S, Q) output widths, rising
    below_input: Ints  # (S, W) input width -> index of the last node up to it
    below_output: Ints  # (S, W) output width -> index of the last node up to it
    nanoseconds: Ints  # (S, Q, P) times at the nodes, rising both ways
    weights: Floats  # (T,) multiply-accumulates of a pair of channels
    calibration: Calibration

    def __call__(self, keep_counts: ArrayLike) -> Ints:
        """Int (..., G) -> int64 (...)."""
        known = self.calibration
        total = known.constant + known.scale * self.sum_layers(keep_counts)
        if known.per_mac:
            total = total + known.per_mac * self.sum_macs(keep_counts)
        return np.rint(total).astype(np.int64)

    def sum_macs(self, keep_counts: ArrayLike) -> Floats:
        """Int (..., G) -> float (...) multiply-accumulates of the timed layers."""
        counts = np.asarray(keep_counts, dtype=np.float64)
        outputs = counts @ self.outputs.T + self.output_bias  # (..., T)
        inputs = counts @ self.inputs.T + self.input_bias
        return (self.weights * inputs * outputs).sum(axis=-1)

    def sum_layers(self, keep_counts: ArrayLike) -> Ints:
        """Int (..., G) -> int64 (...) nanoseconds of the layers timed alone."""
        counts = np.asarray(keep_counts, dtype=np.float64)
        outputs = counts @ self.outputs.T + self.output_bias  # (..., T)
        inputs = counts @ self.inputs.T + self.input_bias
        i, u, dx = _locate(inputs, self.grid_of, self.input_nodes, self.below_input)
        j, v, dy = _locate(outputs, self.grid_of, self.output_nodes, self.below_output)
        s, table = self.grid_of, self.nanoseconds
        below = (dx - u) * table[s, j, i] + u * table[s, j, i + 1]
        above = (dx - u) * table[s, j + 1, i] + u * table[s, j + 1, i + 1]
        layers: Ints = ((dy - v) * below + v * above) // (dx * dy)  # (..., T)
        return layers.sum(axis=-1)


def _locate(widths: Floats, grid_of: Ints, nodes: Ints, below: Ints) -> tuple[Ints, Ints, Ints]:
    """(..., T) index of the node below, distance to it, and distance from it to the next."""
    whole = np.rint(widths).astype(np.int64)
    whole = np.clip(whole, nodes[grid_of, 0], below.shape[1] - 1)
    index = below[grid_of, whole]
    first = nodes[grid_of, index]
    return index, whole - first, nodes[grid_of, index + 1] - first


def make_latency_cost(
    layers: Sequence[Layer],
    grids: Mapping[LayerShape, Grid],
    calibration: Calibration,
    surface: Callable[[Floats], Ints] = monotone,
) -> LatencyCost:
    """The latency of a network as a cost; every shape in `layers` has a grid.

    `surface` makes whole numbers of the times (Q, P) of a grid. A search can rest on the cost only
    where they rise both ways.
    """
    shapes = list(dict.fromkeys(layer.shape for layer in layers))
    chosen = [grids[shape] for shape in shapes]
    input_nodes, below_input = _pad([grid.inputs for grid in chosen])
    output_nodes, below_output = _pad([grid.outputs for grid in chosen])
    times = np.zeros((len(chosen), output_nodes.shape[1], input_nodes.shape[1]), dtype=np.int64)
    for number, grid in enumerate(chosen):
        rising = surface(grid.nanoseconds)
        missing = [(0, most - own) for most, own in zip(times[0].shape, rising.shape, strict=True)]
        times[number] = np.pad(rising, missing, mode="edge")
    return LatencyCost(
        inputs=np.stack([layer.inputs for layer in layers]),
        input_bias=np.array([layer.input_bias for layer in layers]),
        outputs=np.stack([layer.outputs for layer in layers]),
        output_bias=np.array([layer.output_bias for layer in layers]),
        grid_of=np.array([shapes.index(layer.shape) for layer in layers], dtype=np.int64),
        input_nodes=input_nodes,
        output_nodes=output_nodes,
        below_input=below_input,
        below_output=below_output,
        nanoseconds=times,
        weights=np.array([layer.shape.macs_of_a_pair() for layer in layers]),
        calibration=calibration,
    )


def _pad(axes: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Nodes (S, P), one more than the longest axis has, and the lookup (S, W) of widths in them.

    Widths beyond the last node of an axis cost as much as the last.
    """
    longest, widest = max(map(len, axes)) + 1, max(int(axis[-1]) for axis in axes)
    nodes = np.stack(
        [np.append(axis, axis[-1] + 1 + np.arange(longest - len(axis))) for axis in axes]
    )
    widths = np.arange(widest + 1)
    below = np.stack(
        [np.clip(np.searchsorted(axis, widths, "right") - 1, 0, len(axis) - 1) for axis in axes]
    )
    return nodes, below
