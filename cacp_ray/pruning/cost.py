"""The cost of keep counts in closed form: a sum of products of affine functions.

A convolution of C_out filters over C_in channels costs c * C_out * C_in, and after slicing both are
affine in the keep counts K of the channel groups: cost(K) = sum_t c_t (L_t K + l_t) (R_t K + r_t).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.pruning.latency_cost import LatencyCost, Layer

Limited = str | Mapping[str, float]  # what a rate limits: one cost, or several with their weights
COSTS = ("macs", "params", "latency")
UNIT = 10**9  # of a combined cost: the whole network


@dataclass(frozen=True)
class BilinearCost:
    """Exact for integers below 2^53.

    Attributes:
        coefficient: (T,) c_t.
        left: (T, G) L_t.
        left_bias: (T,) l_t.
        right: (T, G) R_t.
        right_bias: (T,) r_t.
    """

    coefficient: NDArray[np.float64]
    left: NDArray[np.float64]
    left_bias: NDArray[np.float64]
    right: NDArray[np.float64]
    right_bias: NDArray[np.float64]

    def __call__(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """Int (..., G) -> int64 (...)."""
        counts = np.asarray(keep_counts, dtype=np.float64)
        left = counts @ self.left.T + self.left_bias
        right = counts @ self.right.T + self.right_bias
        return np.rint((left * right) @ self.coefficient).astype(np.int64)


@dataclass(frozen=True)
class ChannelGroup:
    """Channels of several layers that must be kept or dropped together.

    Attributes:
        name: Module of its first producer, such as `layer1.0.conv1`.
        producers: Modules whose outputs are its channels, such as `layer1.0.conv1`.
        members: Every sliced dimension, such as `layer1.0.conv1.weight:0`.
        num_channels: Channels of the whole network.
        is_residual: Whether a sum of several layers' outputs couples them (a residual stream).
        in_channels: Input channels of the first producer.
        kernel: Kernel height of the first producer, 1 for a linear layer.
        stride: Stride of the first producer.
        height: Rows of the first producer's output, 1 for a linear layer.
        width: Columns of the first producer's output.
    """

    name: str
    producers: tuple[str, ...]
    members: tuple[str, ...]
    num_channels: int
    is_residual: bool
    in_channels: int
    kernel: int
    stride: int
    height: int
    width: int


@dataclass(frozen=True)
class CombinedCost:
    """Several costs limited at once: at rate r, cost i is at most r times its weight of its whole.

    It is the largest of cost_i / whole_i / weight_i in billionths, rounded up, so that a budget of
    it is never above the budget of any of them.

    Attributes:
        parts: Each cost, what the whole network costs, and its weight; the smallest weight is 1.
    """

    parts: tuple[tuple[Callable[[ArrayLike], NDArray[np.int64]], int, float], ...]

    def __call__(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """Int (..., G) -> int64 (...)."""
        shares = [cost(keep_counts) / whole / weight for cost, whole, weight in self.parts]
        return np.ceil(UNIT * np.max(shares, axis=0)).astype(np.int64)


@dataclass(frozen=True)
class CostModel:
    """What keep counts cost.

    Attributes:
        groups: Channel groups in the order of the forward pass.
        macs: For one input.
        params: Parameters.
        layers: Convolutions and linear layers in the order of the forward pass.
        latency: In nanoseconds, None without a table of measured layers.
    """

    groups: tuple[ChannelGroup, ...]
    macs: BilinearCost
    params: BilinearCost
    layers: tuple[Layer, ...] = ()
    latency: LatencyCost | None = None

    @property
    def num_channels(self) -> NDArray[np.int64]:
        """(G,) channels of the whole network."""
        return np.array([group.num_channels for group in self.groups], dtype=np.int64)

    def kind(self, cost: Limited) -> Callable[[ArrayLike], NDArray[np.int64]]:
        """The cost that a rate limits.

        Args:
            cost: `macs`, `params` or `latency`; or several of them, each with its weight: at rate r
                a cost of weight w is at most w r of the whole network's. The smallest weight is 1.
        """
        if not isinstance(cost, str):
            whole = self.num_channels
            kinds = {name: self.kind(name) for name in cost}
            return CombinedCost(
                tuple((kinds[name], int(kinds[name](whole)), cost[name]) for name in cost)
            )
        found = {"macs": self.macs, "params": self.params, "latency": self.latency}[cost]
        assert found is not None, "latency is a cost only with a table"
        return found


def describe_cost(cost: Limited) -> str:
    """What a rate limits, in a few words: `macs`, `macs and latency / 1.2`."""
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
    """(G,) cost that the whole network loses with one channel of each group, at least 1."""
    without = num_channels - np.eye(len(num_channels), dtype=np.int64)  # (G, G)
    return np.maximum(cost(num_channels) - cost(without), 1)
