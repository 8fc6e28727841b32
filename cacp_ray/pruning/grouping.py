"""From the labels of one forward pass to channel groups and their cost in closed form."""

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.cost import BilinearCost, ChannelGroup, CostModel
from cacp_ray.pruning.labels import FROZEN
from cacp_ray.pruning.latency_cost import Layer
from cacp_ray.pruning.tracer import LayerCall, Trace

Key = tuple[str, int]  # a dimension of a parameter or buffer


@dataclass(frozen=True)
class Grouping:
    """Which labels form which group.

    Attributes:
        roots: Per group its labels, channel by channel.
        members: Per group the dimensions that follow it.
        group_of: Label -> group.
        channel_of: Label -> channel of its group.
    """

    roots: list[list[int]]
    members: list[tuple[Key, ...]]
    group_of: dict[int, int]
    channel_of: dict[int, int]

    def axis(self, found: Trace, labels: Tensor) -> Axis | None:
        """How positions with these labels are cut; None where they all stay."""
        roots = found.sets.find(labels.numpy()).tolist()
        group = np.array([self.group_of.get(root, -1) for root in roots])
        if (group < 0).all():
            return None
        return Axis(group, np.array([self.channel_of.get(root, 0) for root in roots]))


def find_groups(found: Trace) -> Grouping:
    """Labels that appear in the same dimensions, equally often, form a group."""
    signature: dict[int, list[tuple[Key, int]]] = defaultdict(list)
    products = {
        (f"#{number}", 0): call.outputs
        for number, call in enumerate(found.calls)
        if call.weight is None
    }
    for key, labels in (found.dims | products).items():
        roots, times = np.unique(found.sets.find(labels.numpy()), return_counts=True)
        for root, count in zip(roots.tolist(), times.tolist(), strict=True):
            if root > FROZEN:
                signature[root].append((key, count))
    made = {root for call in found.calls for root in found.sets.find(call.outputs.numpy()).tolist()}
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


def describe_groups(found: Trace, grouping: Grouping) -> tuple[ChannelGroup, ...]:
    """The groups as their first producers show them."""
    first: dict[int, LayerCall] = {}
    producers: dict[int, dict[str, None]] = defaultdict(dict)  # in the order of the pass
    for call in found.calls:
        for root in set(found.sets.find(call.outputs.numpy()).tolist()):
            if root in grouping.group_of and call.weight is not None:
                first.setdefault(grouping.group_of[root], call)
                producers[grouping.group_of[root]][call.weight.rpartition(".")[0]] = None
    summed = {grouping.group_of.get(root) for root in found.sets.summed_roots()}
    groups = []
    for g, members in enumerate(grouping.members):
        call = first[g]
        assert call.weight is not None
        groups.append(
            ChannelGroup(
                name=call.weight.rpartition(".")[0],
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
    model: nn.Module, found: Trace, grouping: Grouping, axes: dict[Key, Axis]
) -> CostModel:
    """Exact MACs and parameters as functions of keep counts."""
    num_groups = len(grouping.roots)
    macs = []
    for call in found.calls:
        inputs = None if call.inputs is None else grouping.axis(found, call.inputs)
        num_inputs = 1 if call.inputs is None else len(call.inputs)
        outputs = grouping.axis(found, call.outputs)
        macs.append((call.factor, outputs, len(call.outputs), inputs, num_inputs))
    params = []
    for name, parameter in model.named_parameters():
        cut = [dim for dim in range(parameter.ndim) if (name, dim) in axes]
        if len(cut) > 2:
            raise UnsupportedModelError(
                f"parameter {name} follows channel groups in {len(cut)} dims"
            )
        rest = parameter.numel() // int(np.prod([parameter.shape[dim] for dim in cut]))
        pairs: list[tuple[Axis | None, int]] = [
            (axes[name, dim], parameter.shape[dim]) for dim in cut
        ]
        pairs += [(None, 1)] * (2 - len(pairs))
        params.append((rest, *pairs[0], *pairs[1]))
    cost = _bilinear(macs, num_groups)
    return CostModel(
        groups=describe_groups(found, grouping),
        macs=cost,
        params=_bilinear(params, num_groups),
        layers=_describe_layers(found, cost),
    )


def _describe_layers(found: Trace, macs: BilinearCost) -> tuple[Layer, ...]:
    """Convolutions and linear layers; row t of `macs` is call t."""
    layers = []
    for t, call in enumerate(found.calls):
        if call.shape is not None:
            shape = dataclasses.replace(call.shape, batch_norm=call.weight in found.batch_norms)
            outputs, inputs = (macs.left[t], macs.left_bias[t]), (macs.right[t], macs.right_bias[t])
            layers.append(Layer(shape, *inputs, *outputs))
    return tuple(layers)


def _bilinear(
    terms: Sequence[tuple[int, Axis | None, int, Axis | None, int]], num_groups: int
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


def _affine(axis: Axis | None, size: int, num_groups: int) -> tuple[np.ndarray, float]:
    """Length of a dimension as slope (G,) and intercept over keep counts."""
    if axis is None:
        return np.zeros(num_groups), float(size)
    slope = np.zeros(num_groups)
    for group in set(axis.group.tolist()) - {-1}:
        positions = axis.group == group
        slope[group] = positions.sum() / (axis.channel[positions].max() + 1)
    return slope, float((axis.group == -1).sum())
