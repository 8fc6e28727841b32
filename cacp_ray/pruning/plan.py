"""The slicing plan of a network: channel groups, exact cost, and what follows which group.

Made once by `make_plan`; afterwards no tracing is needed: keep counts K and an importance order say
which positions of every parameter and buffer remain, and the cost is a closed form of K.
"""

import fnmatch
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from cacp_ray.errors import ConfigError, UnsupportedModelError
from cacp_ray.pruning.cost import BilinearCost, ChannelGroup, CostModel
from cacp_ray.pruning.labels import FROZEN
from cacp_ray.pruning.trace import LayerCall, Trace, trace


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter or buffer that follows channel groups.

    Attributes:
        group: (size,) group of each position, -1 for positions that always stay.
        channel: (size,) channel of the group at each position, 0 where it always stays.
    """

    group: NDArray[np.int64]
    channel: NDArray[np.int64]

    def positions(self, keep_counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions that remain when every group keeps its first K channels."""
        counts = np.append(np.asarray(keep_counts), 1)  # group -1 reads the last entry
        return np.flatnonzero(self.channel < counts[self.group])

    def reordered(self, orders: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Position p of the reordered network holds position `result[p]` of the original.

        Channel i of the reordered group g is channel orders[g][i] of the original.
        """
        where: dict[tuple[int, int], list[int]] = defaultdict(list)
        for position, key in enumerate(
            zip(self.group.tolist(), self.channel.tolist(), strict=True)
        ):
            where[key].append(position)
        seen: dict[tuple[int, int], int] = defaultdict(int)
        result = np.empty(len(self.group), dtype=np.int64)
        for position, key in enumerate(
            zip(self.group.tolist(), self.channel.tolist(), strict=True)
        ):
            group, channel = key
            source = (group, int(orders[group][channel])) if group >= 0 else key
            result[position] = where[source][seen[key]]
            seen[key] += 1
        return result

    @property
    def single_group(self) -> int | None:
        """The group of all positions where the kept ones are always the leading ones, else None."""
        group = int(self.group[0])
        if group < 0 or (self.group != group).any() or (np.diff(self.channel) < 0).any():
            return None
        return group

    @property
    def multiplicity(self) -> int:
        """Positions a channel, for an axis of a single group."""
        return len(self.group) // (int(self.channel[-1]) + 1)


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
        fixed: Name of a layer whose outputs stay whole -> the reason.
        input_shape: (C, H, W).
    """

    cost_model: CostModel
    axes: dict[tuple[str, int], Axis]
    consumers: tuple[Consumer, ...]
    fixed: dict[str, str]
    input_shape: tuple[int, ...]

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in the order of the forward pass."""
        return self.cost_model.groups

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
                any(
                    fnmatch.fnmatch(member.rpartition(".")[0], pattern)
                    for member in group.members
                    if member.endswith(".weight:0")
                )
                for group in self.groups
            ]
            if not any(hits):
                raise ConfigError(
                    f"keep pattern {pattern!r} matches no layer with prunable channels: "
                    "see `cacp-ray inspect`"
                )
            prunable &= ~np.array(hits)
        return prunable


def make_plan(model: nn.Module, example_input: Tensor) -> Plan:
    """Traces the network once and describes how it may be cut.

    Args:
        model: Not changed.
        example_input: (1, C, H, W).

    Raises:
        UnsupportedModelError: The network does not run, or has no prunable channels.
    """
    found = trace(model, example_input)
    group_of, channel_of, members = _find_groups(found)
    if not members:
        reasons = sorted(found.sets.all_reasons)
        raise UnsupportedModelError(
            f"no prunable channels in {type(model).__name__}: "
            f"{'; '.join(reasons[:3]) or 'it has no convolutions'}"
        )
    axes = {}
    for key, labels in found.dims.items():
        roots = found.sets.find(labels.numpy())
        group = np.array([group_of.get(int(root), -1) for root in roots])
        if (group >= 0).any():
            axes[key] = Axis(group, np.array([channel_of.get(int(root), 0) for root in roots]))
    cost_model = CostModel(
        groups=_describe_groups(found, group_of, members),
        macs=_macs_of(found, axes, len(members)),
        params=_params_of(model, axes, len(members)),
    )
    consumers = {
        call.weight: Consumer(
            call.weight.rpartition(".")[0], call.weight, found.batch_norms.get(call.weight)
        )
        for call in found.calls
        if call.in_labels is not None and (call.weight, 1) in axes
    }
    fixed = {}
    for call in found.calls:
        if (call.weight, 0) not in axes:
            label = int(call.out_labels[0])
            fixed[call.weight.rpartition(".")[0]] = found.sets.reason(label)
    shape = tuple(example_input.shape[1:])
    return Plan(cost_model, axes, tuple(consumers.values()), fixed, shape)


def _find_groups(
    found: Trace,
) -> tuple[dict[int, int], dict[int, int], list[tuple[tuple[str, int], ...]]]:
    """Labels that appear in the same dimensions, equally often, form a group."""
    signature: dict[int, list[tuple[tuple[str, int], int]]] = defaultdict(list)
    for key, labels in found.dims.items():
        roots, times = np.unique(found.sets.find(labels.numpy()), return_counts=True)
        for root, count in zip(roots.tolist(), times.tolist(), strict=True):
            if root > FROZEN:
                signature[root].append((key, count))
    by_signature: dict[tuple[tuple[tuple[str, int], int], ...], list[int]] = defaultdict(list)
    for root in sorted(signature):
        by_signature[tuple(signature[root])].append(root)
    # A single channel can be neither kept nor dropped in part: it stays.
    groups = sorted((r for r in by_signature.values() if len(r) > 1), key=lambda roots: roots[0])
    group_of = {root: g for g, roots in enumerate(groups) for root in roots}
    channel_of = {root: i for roots in groups for i, root in enumerate(roots)}
    members = [tuple(key for key, _ in signature[roots[0]]) for roots in groups]
    return group_of, channel_of, members


def _describe_groups(
    found: Trace, group_of: dict[int, int], members: Sequence[tuple[tuple[str, int], ...]]
) -> tuple[ChannelGroup, ...]:
    first: dict[int, LayerCall] = {}
    for call in found.calls:
        for root in set(found.sets.find(call.out_labels.numpy()).tolist()):
            if root in group_of:
                first.setdefault(group_of[root], call)
    summed = {group_of.get(int(found.sets.find(np.array([r]))[0])) for r in found.sets.summed}
    sizes = np.bincount(list(group_of.values()), minlength=len(members))
    groups = []
    for g, dims in enumerate(members):
        call = first[g]
        groups.append(
            ChannelGroup(
                name=call.weight.rpartition(".")[0],
                members=tuple(f"{name}:{dim}" for name, dim in dims),
                num_channels=int(sizes[g]),
                is_residual=g in summed,
                in_channels=1 if call.in_labels is None else len(call.in_labels),
                kernel=call.kernel,
                stride=call.stride,
                height=call.height,
                width=call.width,
            )
        )
    return tuple(groups)


def _affine(axis: Axis | None, size: int, num_groups: int) -> tuple[NDArray[np.float64], float]:
    """Length of a dimension as slope (G,) and intercept over keep counts."""
    if axis is None:
        return np.zeros(num_groups), float(size)
    slope = np.zeros(num_groups)
    for group in set(axis.group.tolist()) - {-1}:
        positions = axis.group == group
        slope[group] = positions.sum() / (axis.channel[positions].max() + 1)
    return slope, float((axis.group == -1).sum())


def _bilinear(
    terms: Sequence[tuple[float, Axis | None, int, Axis | None, int]], num_groups: int
) -> BilinearCost:
    left = [_affine(axis, size, num_groups) for _, axis, size, _, _ in terms]
    right = [_affine(axis, size, num_groups) for _, _, _, axis, size in terms]
    return BilinearCost(
        coefficient=np.array([term[0] for term in terms], dtype=np.float64),
        left=np.stack([slope for slope, _ in left]),
        left_bias=np.array([bias for _, bias in left]),
        right=np.stack([slope for slope, _ in right]),
        right_bias=np.array([bias for _, bias in right]),
    )


def _macs_of(found: Trace, axes: dict[tuple[str, int], Axis], num_groups: int) -> BilinearCost:
    terms = []
    for call in found.calls:
        inputs = 1 if call.in_labels is None else len(call.in_labels)
        terms.append(
            (
                call.positions * call.taps,
                axes.get((call.weight, 0)),
                len(call.out_labels),
                None if call.in_labels is None else axes.get((call.weight, 1)),
                inputs,
            )
        )
    return _bilinear(terms, num_groups)


def _params_of(
    model: nn.Module, axes: dict[tuple[str, int], Axis], num_groups: int
) -> BilinearCost:
    terms = []
    for name, parameter in model.named_parameters():
        cut = [dim for dim in range(parameter.ndim) if (name, dim) in axes]
        if len(cut) > 2:
            raise UnsupportedModelError(
                f"parameter {name} follows channel groups in {len(cut)} dims"
            )
        rest = parameter.numel() / np.prod([parameter.shape[dim] for dim in cut])
        pairs = [(axes[name, dim], parameter.shape[dim]) for dim in cut]
        pairs += [(None, 1)] * (2 - len(pairs))
        terms.append((float(rest), *pairs[0], *pairs[1]))
    return _bilinear(terms, num_groups)


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs for one input as PyTorch's own counter sees them."""
    from torch.utils.flop_counter import FlopCounterMode

    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input)
    return counter.get_total_flops() // 2
