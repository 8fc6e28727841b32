"""The slicing plan of a network: channel groups, exact cost, and what follows which group.

Made once by `make_plan`; afterwards no tracing is needed: keep counts K and an importance order say
which positions of every parameter and buffer remain, and the cost is a closed form of K.
"""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from cacp_ray.errors import ConfigError, UnsupportedModelError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.cost import ChannelGroup, CostModel
from cacp_ray.pruning.grouping import Grouping, find_groups, make_cost_model
from cacp_ray.pruning.trace import trace
from cacp_ray.pruning.tracer import Trace
from cacp_ray.pruning.verify import find_failures


@dataclass(frozen=True)
class Consumer:
    """A convolution (groups = 1) or linear layer that mixes prunable input channels.

    Attributes:
        module: Its name.
        weight: Its weight's name: (C_out, C_in, ...).
        batch_norm: Prefix of the BN that alone takes its output, None where there is none.
    """

    module: str
    weight: str
    batch_norm: str | None


@dataclass(frozen=True)
class Plan:
    """How a network may be cut.

    Attributes:
        cost_model: Groups and their exact cost.
        axes: (name, dim) -> how that dimension of a parameter or buffer is cut.
        consumers: Layers whose input channels can be cut, in the order of the forward pass.
        normalised: Groups that some layer normalises over: it sees fewer channels after a cut.
        fixed: Name of a layer whose outputs stay whole -> the reason.
        input_shape: (C, H, W).
    """

    cost_model: CostModel
    axes: dict[tuple[str, int], Axis]
    consumers: tuple[Consumer, ...]
    normalised: tuple[int, ...]
    fixed: dict[str, str]
    input_shape: tuple[int, ...]

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in the order of the forward pass."""
        return self.cost_model.groups

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
            hits = [
                any(fnmatch.fnmatch(producer, pattern) for producer in group.producers)
                for group in self.groups
            ]
            is_whole = any(fnmatch.fnmatch(name, pattern) for name in self.fixed)
            if not any(hits) and not is_whole:
                inside = any(
                    producer.startswith(f"{pattern}.")
                    for group in self.groups
                    for producer in group.producers
                )
                raise ConfigError(
                    f"keep pattern {pattern!r} matches no layer: "
                    + (f"write {pattern}.*" if inside else "see `cacp-ray inspect`")
                )
            prunable &= ~np.array(hits, dtype=bool)
        return prunable


def make_plan(model: nn.Module, example_input: Tensor) -> Plan:
    """Traces the network once, describes how it may be cut, and tries it out.

    Args:
        model: Not changed.
        example_input: (1, C, H, W).

    Raises:
        UnsupportedModelError: The network does not run, or has no prunable channels.
    """
    found = trace(model, example_input)
    while True:
        grouping = find_groups(found)
        if not grouping.roots:
            reasons = sorted(found.sets.all_reasons)
            raise UnsupportedModelError(
                f"no prunable channels in {type(model).__name__}: "
                f"{'; '.join(reasons[:3]) or 'it has no convolutions'}"
            )
        plan = _assemble(model, found, grouping, tuple(example_input.shape[1:]))
        failures = find_failures(model, plan, example_input)
        if not failures:
            return plan
        for group, reason in failures.items():
            found.sets.freeze(torch.tensor(grouping.roots[group]), reason)


def _assemble(
    model: nn.Module, found: Trace, grouping: Grouping, input_shape: tuple[int, ...]
) -> Plan:
    axes = {
        key: axis
        for key, labels in found.dims.items()
        if (axis := grouping.axis(found, labels)) is not None
    }
    consumers = {
        call.weight: Consumer(
            call.weight.rpartition(".")[0], call.weight, found.batch_norms.get(call.weight)
        )
        for call in found.calls
        if call.weight is not None and call.is_mixing and (call.weight, 1) in axes
    }
    fixed = {}
    for call in found.calls:
        if call.weight is not None and grouping.axis(found, call.outputs) is None:
            root = int(call.outputs[0])
            fixed[call.weight.rpartition(".")[0]] = found.sets.reason(root)
    normalised = {grouping.group_of.get(root, -1) for root in found.sets.normalised_roots()} - {-1}
    return Plan(
        cost_model=make_cost_model(model, found, grouping, axes),
        axes=axes,
        consumers=tuple(consumers.values()),
        normalised=tuple(sorted(normalised)),
        fixed=fixed,
        input_shape=input_shape,
    )


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs for one input as PyTorch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input)
    return counter.get_total_flops() // 2
