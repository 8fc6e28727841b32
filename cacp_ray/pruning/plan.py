"""The plan of a network: channel groups, exact cost, and the tensor dimensions of each group.

`make_plan` (`cacp_ray.pruning.planner`) makes it once. No tracing is needed afterwards: keep counts
and an importance order say which positions of every parameter and buffer remain, and the cost is a
closed form of the keep counts.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.cost import ChannelGroup, CostModel


@dataclass(frozen=True)
class Consumer:
    """A convolution (groups = 1) or linear layer that mixes prunable input channels."""

    module: str  # name of the layer
    weight: str  # name of its weight (C_out, C_in, ...)
    batch_norm: str | None  # prefix of the BN that alone takes its output, None where there is none


@dataclass(frozen=True)
class Plan:
    """How a network may be cut.

    Attributes:
        cost_model: Groups and their exact cost.
        axes: (name, dim) -> how that dimension of a parameter or buffer is cut.
        consumers: Layers whose input channels can be cut, in the order of the forward pass.
        normalised: Groups that some layer normalises over: it sees fewer channels after a cut.
        fixed: Name of a layer whose outputs stay whole -> the reason.
        input_shape: (C, H, W), or that of the first input without its batch.
        uncounted: Operation with work and no cost formula -> times it ran.
    """

    cost_model: CostModel
    axes: dict[tuple[str, int], Axis]
    consumers: tuple[Consumer, ...]
    normalised: tuple[int, ...]
    fixed: dict[str, str]
    input_shape: tuple[int, ...]
    uncounted: dict[str, int] = field(default_factory=dict[str, int])

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in the order of the forward pass."""
        return self.cost_model.groups

    def describe_uncounted(self) -> str:
        """Names the operations whose work is not counted; empty where all work is."""
        names = [
            name if times == 1 else f"{name} ({times} times)"
            for name, times in self.uncounted.items()
        ]
        return ", ".join(names)

    @property
    def least_counts(self) -> NDArray[np.int64]:
        """(G,) fewest channels that work: 1, or 2 where a layer normalises over them."""
        least = np.ones(len(self.groups), dtype=np.int64)
        least[list(self.normalised)] = 2
        return least

    def macs(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """MACs for one input: int (..., G) -> (...)."""
        return self.cost_model.macs(keep_counts)

    def params(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """Parameters: int (..., G) -> (...)."""
        return self.cost_model.params(keep_counts)

    def select_groups(self, keep_patterns: Sequence[str]) -> NDArray[np.bool_]:
        """(G,) whether a group may be cut: no layer that makes its channels matches a pattern.

        Raises:
            ConfigError: A pattern matches nothing.
        """
        prunable = np.ones(len(self.groups), dtype=bool)
        for pattern in keep_patterns:
            is_hit = [
                any(fnmatch.fnmatch(producer, pattern) for producer in group.producers)
                for group in self.groups
            ]
            is_fixed = any(fnmatch.fnmatch(name, pattern) for name in self.fixed)
            if not any(is_hit) and not is_fixed:
                has_layers_inside = any(
                    producer.startswith(f"{pattern}.")
                    for group in self.groups
                    for producer in group.producers
                )
                raise ConfigError(
                    f"keep pattern {pattern!r} matches no layer: "
                    + (f"write {pattern}.*" if has_layers_inside else "see `cacp-ray inspect`")
                )
            prunable &= ~np.array(is_hit, dtype=bool)
        return prunable
