"""The cost of keep counts in closed form: a sum of products of affine functions.

A convolution of C_out filters over C_in channels costs c * C_out * C_in, and after a cut both are
affine in the keep counts K of the channel groups: cost(K) = sum_t c_t (L_t K + l_t) (R_t K + r_t).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.pruning.latency_cost import LatencyCost, Layer

Limited = str | Mapping[str, float]  # what a rate limits: one cost, or several with weights
COSTS = ("macs", "params", "latency")
UNIT = 10**9  # combined cost of the whole network


@dataclass(frozen=True)
class BilinearCost:
    """A sum of products, exact for integers below 2^53."""

    coefficient: NDArray[np.float64]  # (T,) c_t
    left: NDArray[np.float64]  # (T, G) L_t
    left_bias: NDArray[np.float64]  # (T,) l_t
    right: NDArray[np.float64]  # (T, G) R_t
    right_bias: NDArray[np.float64]  # (T,) r_t

    def __call__(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """Int (..., G) -> int64 (...)."""
        counts = np.asarray(keep_counts, dtype=np.float64)
        left = counts @ self.left.T + self.left_bias
        right = counts @ self.right.T + self.right_bias
        return np.rint((left * right) @ self.coefficient).astype(np.int64)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that must be kept or dropped together."""

    name: str  # module of its first producer, such as `layer1.0.conv1`
    producers: tuple[str, ...]  # modules whose outputs are its channels
    members: tuple[str, ...]  # dimensions that follow it, such as `layer1.0.conv1.weight:0`
    num_channels: int  # channels in the whole network
    is_residual: bool  # whether a sum of several layers' outputs couples them (a residual stream)
    in_channels: int  # input channels of the first producer
    kernel: int  # kernel height of the first producer, 1 for a linear layer
    stride: int  # stride of the first producer
    height: int  # rows of the first producer's output, 1 for a linear layer
    width: int  # columns of the first producer's output


@dataclass(frozen=True)
class CombinedCost:
    """Several costs limited at once: at rate r, cost i is at most r * weight_i * whole_i.

    Its value is the largest of cost_i / whole_i / weight_i in billionths, rounded up, so that its
    budget is never above the budget of any part.

    Attributes:
        parts: (cost, cost of the whole network, weight) of each part; the smallest weight is 1.
    """

    parts: tuple[tuple[Callable[[ArrayLike], NDArray[np.int64]], int, float], ...]

    def __call__(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """Int (..., G) -> int64 (...)."""
        shares = [cost(keep_counts) / whole / weight for cost, whole, weight in self.parts]
        return np.ceil(UNIT * np.max(shares, axis=0)).astype(np.int64)


@dataclass(frozen=True)
class CostModel:
    """What keep counts cost."""

    groups: tuple[ChannelGroup, ...]  # in the order of the forward pass
    macs: BilinearCost  # MACs for one input
    params: BilinearCost
    layers: tuple[Layer, ...] = ()  # convolutions and linear layers, in the same order
    latency: LatencyCost | None = None  # nanoseconds, None without a table of measured layers

    @property
    def num_channels(self) -> NDArray[np.int64]:
        """(G,) channels in the whole network."""
        return np.array([group.num_channels for group in self.groups], dtype=np.int64)

    def kind(self, cost: Limited) -> Callable[[ArrayLike], NDArray[np.int64]]:
        """The cost that a rate limits; `CombinedCost` for several with weights."""
        if not isinstance(cost, str):
            whole, parts = self.num_channels, [(self.kind(name), w) for name, w in cost.items()]
            return CombinedCost(tuple((part, int(part(whole)), weight) for part, weight in parts))
        chosen = {"macs": self.macs, "params": self.params, "latency": self.latency}[cost]
        assert chosen is not None, "latency is a cost only with a table"
        return chosen


def describe_cost(cost: Limited) -> str:
    """What a rate limits, such as `macs` or `macs and latency / 1.2`."""
    if isinstance(cost, str):
        return cost
    return " and ".join(name if w == 1 else f"{name} / {w:g}" for name, w in cost.items())


def describe_total(cost: Limited, total: int) -> str:
    """What the whole network costs, with its unit."""
    if not isinstance(cost, str):
        return describe_cost(cost)
    return f"{total / 1e6:.3f} ms latency" if cost == "latency" else f"{total:,} {cost}"


def freed_by_one_channel(
    cost: Callable[[NDArray[np.int64]], NDArray[np.int64]], num_channels: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(G,) cost, at least 1, that the whole network loses with one channel of a group."""
    without = num_channels - np.eye(len(num_channels), dtype=np.int64)  # (G, G)
    return np.maximum(cost(num_channels) - cost(without), 1)
