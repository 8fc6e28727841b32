"""Turns the labels of one forward pass into channel groups and their cost in closed form."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.cost import BilinearCost, ChannelGroup, CostModel
from cacp_ray.pruning.labels import FROZEN
from cacp_ray.pruning.latency_cost import Layer
from cacp_ray.pruning.tracer import LayerCall, Trace

Key = tuple[str, int]  # name of a parameter or buffer, dimension
Term = tuple[int, Axis | None, int, Axis | None, int]  # factor, outputs, inputs: axis, whole size


@dataclass(frozen=True)
class Grouping:
    """Which labels form which group."""

    roots: list[list[int]]  # labels of each group, channel by channel
    members: list[tuple[Key, ...]]  # dimensions that follow each group
    group_of: dict[int, int]  # label -> group
    channel_of: dict[int, int]  # label -> channel of its group

    def axis(self, trace: Trace, labels: Tensor) -> Axis | None:
        """How a dimension with these labels is cut; None where all of it stays."""
        roots = trace.sets.find(labels.numpy()).tolist()
        group = np.array([self.group_of.get(root, -1) for root in roots])
        if (group < 0).all():
            return None
        return Axis(group, np.array([self.channel_of.get(root, 0) for root in roots]))


def find_groups(trace: Trace) -> Grouping:
    """Forms groups of the labels that appear in the same dimensions, equally often."""
    signature: dict[int, list[tuple[Key, int]]] = defaultdict(list)
    products = {
        (f"#{number}", 0): call.outputs
        for number, call in enumerate(trace.calls)
        if call.weight is None
    }
    for key, labels in (trace.dims | products).items():
        roots, times = np.unique(trace.sets.find(labels.numpy()), return_counts=True)
        for root, count in zip(roots.tolist(), times.tolist(), strict=True):
            if root > FROZEN:
                signature[root].append((key, count))
    made = {root for call in trace.calls for root in trace.sets.find(call.outputs.numpy()).tolist()}
    by_signature: dict[tuple[tuple[Key, int], ...], list[int]] = defaultdict(list)
    for root in sorted(signature):
        if root in made:
            by_signature[tuple(signature[root])].append(root)
    # A single channel can be neither kept nor dropped in part: it stays.
    groups = sorted((r for r in by_signature.values() if len(r) > 1), key=lambda roots: roots[0])
    return Grouping(
        roots=groups,
        members=[
            tuple(key for key, _ in signature[roots[0]] if key not in products) for roots in groups
        ],
        group_of={root: g for g, roots in enumerate(groups) for root in roots},
        channel_of={root: i for roots in groups for i, root in enumerate(roots)},
    )


def describe_groups(trace: Trace, grouping: Grouping) -> tuple[ChannelGroup, ...]:
    """Describes each group by its first producer."""
    producers: dict[int, dict[str, LayerCall]] = defaultdict(dict)  # in the order of the pass
    for call in trace.calls:
        for root in set(trace.sets.find(call.outputs.numpy()).tolist()):
            if root in grouping.group_of and call.weight is not None:
                module = call.weight.rpartition(".")[0]
                producers[grouping.group_of[root]].setdefault(module, call)
    summed = {grouping.group_of.get(root) for root in trace.sets.roots(trace.sets.summed)}
    groups: list[ChannelGroup] = []
    for g, members in enumerate(grouping.members):
        name, call = next(iter(producers[g].items()))
        groups.append(
            ChannelGroup(
                name=name,
                producers=tuple(producers[g]),
                members=tuple(f"{name}:{dim}" for name, dim in members),
                num_channels=len(grouping.roots[g]),
                is_residual=g in summed,
                in_channels=1 if call.inputs is None else len(call.inputs),
                kernel=call.kernel,
                stride=call.stride,
                height=call.height,
                width=call.width,
            )
        )
    return tuple(groups)


def make_cost_model(
    model: nn.Module, trace: Trace, grouping: Grouping, axes: dict[Key, Axis]
) -> CostModel:
    """Exact MACs and parameters as functions of keep counts."""
    num_groups = len(grouping.roots)
    macs: list[Term] = []
    for call in trace.calls:
        inputs = None if call.inputs is None else grouping.axis(trace, call.inputs)
        num_inputs = 1 if call.inputs is None else len(call.inputs)
        outputs = grouping.axis(trace, call.outputs)
        macs.append((call.factor, outputs, len(call.outputs), inputs, num_inputs))
    params: list[Term] = []
    for name, parameter in model.named_parameters():
        cut = [dim for dim in range(parameter.ndim) if (name, dim) in axes]
        if len(cut) > 2:
            raise UnsupportedModelError(
                f"parameter {name} follows channel groups in {len(cut)} dims"
            )
        rest = parameter.numel() // int(np.prod([parameter.shape[dim] for dim in cut]))
        sides: list[tuple[Axis | None, int]] = [(axes[name, d], parameter.shape[d]) for d in cut]
        sides += [(None, 1)] * (2 - len(sides))
        params.append((rest, *sides[0], *sides[1]))
    cost = _bilinear(macs, num_groups)
    return CostModel(
        groups=describe_groups(trace, grouping),
        macs=cost,
        params=_bilinear(params, num_groups),
        layers=_describe_layers(trace, cost),
    )


def _describe_layers(trace: Trace, macs: BilinearCost) -> tuple[Layer, ...]:
    """Convolutions and linear layers with their widths, which row t of `macs` has for call t."""
    layers: list[Layer] = []
    for t, call in enumerate(trace.calls):
        if call.shape is not None:
            shape = dataclasses.replace(call.shape, batch_norm=call.weight in trace.batch_norms)
            outputs, inputs = (macs.left[t], macs.left_bias[t]), (macs.right[t], macs.right_bias[t])
            layers.append(Layer(shape, *inputs, *outputs))
    return tuple(layers)


def _bilinear(terms: Sequence[Term], num_groups: int) -> BilinearCost:
    left = [_affine(axis, size, num_groups) for _, axis, size, _, _ in terms]
    right = [_affine(axis, size, num_groups) for _, _, _, axis, size in terms]
    return BilinearCost(
        coefficient=np.array([term[0] for term in terms], dtype=np.float64),
        left=np.stack([slope for slope, _ in left]),
        left_bias=np.array([bias for _, bias in left]),
        right=np.stack([slope for slope, _ in right]),
        right_bias=np.array([bias for _, bias in right]),
    )


def _affine(axis: Axis | None, size: int, num_groups: int) -> tuple[NDArray[np.float64], float]:
    """Length of a dimension as slope (G,) and intercept over keep counts."""
    if axis is None:
        return np.zeros(num_groups), float(size)
    slope = np.zeros(num_groups)
    for group in axis.groups:
        positions = axis.group == group
        slope[group] = positions.sum() / (axis.channel[positions].max() + 1)
    return slope, float((axis.group == -1).sum())
