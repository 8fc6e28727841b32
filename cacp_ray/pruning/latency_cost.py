"""Latency as a cost: measured layers summed, monotone in every keep count.

Each layer of the network was timed alone at a grid of widths (`cacp_ray.evaluation.latency_table`).
Between the widths of a grid its time is interpolated bilinearly, in whole numbers, so that it never
falls when a width grows. What a network adds to its layers (sums, activations, pools, calls) is a
calibration of three numbers: latency = constant + scale * layers + per_activation * activations.
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
    """All that the time of a layer depends on beside its numbers of channels.

    Attributes:
        kind: `conv` or `linear`.
        kernel: Height and width, 1 for linear; so are the next three.
        stride: Rows, columns.
        padding: Rows, columns.
        dilation: Rows, columns.
        groups: Parts of a convolution, each of which keeps the same places; 0 where parts stay or
            go whole, as in depthwise convolutions.
        part: Inputs and outputs of a part where `groups` is 0, else (1, 1).
        bias: Whether it adds one.
        batch_norm: Whether a batch norm alone takes its output; it is timed with the layer.
        height: Rows of the input; rows of the matrix for linear.
        width: Columns of the input, 1 for linear.
    """

    kind: str
    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    groups: int
    part: Pair
    bias: bool
    batch_norm: bool
    height: int
    width: int

    def __str__(self) -> str:
        if self.kind == "linear":
            return "linear"
        kernel, stride = "x".join(map(str, self.kernel)), max(self.stride)
        parts = {1: "", 0: " depthwise"}.get(self.groups, f" of {self.groups} groups")
        return f"conv {kernel}{parts} stride {stride} on {self.height}x{self.width}"


@dataclass(frozen=True)
class Layer:
    """One use of a layer in a network; its widths are affine in the keep counts K.

    Attributes:
        shape: What it does.
        inputs: (G,) slope of C_in, of one part where `shape.groups` > 1; unused where it is 0.
        input_bias: Intercept of C_in.
        outputs: (G,) slope of C_out.
        output_bias: Intercept of C_out.
    """

    shape: LayerShape
    inputs: Floats
    input_bias: float
    outputs: Floats
    output_bias: float


@dataclass(frozen=True)
class Grid:
    """Times of one layer shape.

    Attributes:
        inputs: (P,) widths, rising.
        outputs: (Q,) widths, rising.
        nanoseconds: (Q, P) as measured.
    """

    inputs: Ints
    outputs: Ints
    nanoseconds: Floats


@dataclass(frozen=True)
class Calibration:
    """What makes the sum of the layers the latency of a network; nothing here is negative.

    Attributes:
        constant: Nanoseconds of every network.
        scale: Factor of the sum of the layers.
    """

    constant: float = 0.0
    scale: float = 1.0


def monotone(times: ArrayLike) -> Ints:
    """The whole numbers nearest to `times` (Q, P), in their largest error, that rise both ways.

    A measured table is a noisy staircase: widths that the kernels like are faster than smaller
    ones. The surface lies in the middle of the running maximum from the smallest widths and the
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
    """Nanoseconds of keep counts; never falls when a count grows.

    Attributes:
        inputs: (T, G) slopes of C_in of T layers.
        input_bias: (T,) their intercepts.
        outputs: (T, G) slopes of C_out.
        output_bias: (T,) their intercepts.
        grid_of: (T,) index of each layer's grid.
        input_nodes: (S, P) widths of S grids, rising.
        output_nodes: (S, Q) widths, rising.
        below_input: (S, W) width -> index of the last node up to it.
        below_output: (S, W) the same.
        nanoseconds: (S, Q, P) at the nodes, rising both ways.
        calibration: Of whole networks.
    """

    inputs: Floats
    input_bias: Floats
    outputs: Floats
    output_bias: Floats
    grid_of: Ints
    input_nodes: Ints
    output_nodes: Ints
    below_input: Ints
    below_output: Ints
    nanoseconds: Ints
    calibration: Calibration

    def __call__(self, keep_counts: ArrayLike) -> Ints:
        """Int (..., G) -> int64 (...)."""
        found = self.calibration
        total = found.constant + found.scale * self.sum_layers(keep_counts)
        return np.rint(total).astype(np.int64)

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
    """(..., T) node below, distance to it, and from it to the next."""
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
    """The cost of a network.

    Args:
        layers: Of the network.
        grids: At least of these layers.
        calibration: Of whole networks.
        surface: Makes whole numbers of the times (Q, P) of a grid. Only where it makes them rise
            both ways can a search rest on the cost.
    """
    shapes = list(dict.fromkeys(layer.shape for layer in layers))
    chosen = [grids[shape] for shape in shapes]
    input_nodes, below_input = _pad([grid.inputs for grid in chosen])
    output_nodes, below_output = _pad([grid.outputs for grid in chosen])
    times = np.zeros((len(chosen), output_nodes.shape[1], input_nodes.shape[1]), dtype=np.int64)
    for number, grid in enumerate(chosen):
        found = surface(grid.nanoseconds)
        right, down = (len(nodes) for nodes in (grid.inputs, grid.outputs))
        missing = ((0, times.shape[1] - down), (0, times.shape[2] - right))
        times[number] = np.pad(found, missing, mode="edge")
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
        calibration=calibration,
    )


def _pad(axes: Sequence[Ints]) -> tuple[Ints, Ints]:
    """(S, P) nodes, each axis with one more at its end and as many as the longest; lookup (S, W).

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
