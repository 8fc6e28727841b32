"""From keep counts to a physically small network, with no copy or trace a candidate.

The weights are permuted once into importance order. A subnet keeps the first K channels of each
group, so almost every small tensor is a leading slice, a view, of the permuted one.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from cacp_ray.pruning.plan import Plan

Orders = Sequence[NDArray[np.int64]]


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that the state dict leaves out; shared ones once."""
    found = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in found}


def reorder_weights(
    plan: "Plan", tensors: Mapping[str, Tensor], orders: Orders
) -> dict[str, Tensor]:
    """The state dict of the same network with each group's channels in importance order.

    Args:
        plan: Of the network.
        tensors: Its tensors by name (`all_tensors`).
        orders: Per group a permutation (C,), best channel first.
    """
    result = dict(tensors)
    for (name, dim), axis in plan.axes.items():
        index = torch.from_numpy(axis.reordered(orders))
        result[name] = result[name].index_select(dim, index)
    return result


class Slicer:
    """Cuts reordered tensors to keep counts; views where the kept positions lead."""

    def __init__(self, plan: "Plan") -> None:
        self._plan = plan
        self._leading = {
            key: (group, axis.multiplicity)
            for key, axis in plan.axes.items()
            if (group := axis.single_group) is not None
        }
        # Tensors whose kept positions lead in every dimension are cut by one call each.
        dims: dict[str, list[int]] = {}
        for name, dim in plan.axes:
            dims.setdefault(name, []).append(dim)
        self._views = {
            name: [(dim, *self._leading[name, dim]) for dim in own]
            for name, own in dims.items()
            if all((name, dim) in self._leading for dim in own)
        }

    def size(self, name: str, dim: int, keep_counts: Sequence[int]) -> int | None:
        """Kept positions of a dimension where they lead, else None."""
        if (name, dim) not in self._leading:
            return None
        group, multiplicity = self._leading[name, dim]
        return keep_counts[group] * multiplicity

    def cut(self, name: str, dim: int, tensor: Tensor, keep_counts: Sequence[int]) -> Tensor:
        """Cuts one dimension of a reordered tensor; other dimensions are left alone."""
        size = self.size(name, dim, keep_counts)
        if size is not None:
            return tensor.narrow(dim, 0, size)
        if (name, dim) not in self._plan.axes:
            return tensor
        positions = self._plan.axes[name, dim].positions(keep_counts)
        return tensor.index_select(dim, torch.from_numpy(positions).to(tensor.device))

    def __call__(
        self, tensors: Mapping[str, Tensor], keep_counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """Small tensors for every name that follows a group; the others are not returned."""
        small: dict[str, Tensor] = {}
        for name, dims in self._views.items():
            tensor = tensors[name]
            size = list(tensor.shape)
            for dim, group, multiplicity in dims:
                size[dim] = keep_counts[group] * multiplicity
            small[name] = tensor.as_strided(size, tensor.stride(), tensor.storage_offset())
        for name, dim in self._plan.axes:
            if name in self._views:
                continue
            small[name] = self.cut(name, dim, small.get(name, tensors[name]), keep_counts)
        return small


class Skeleton:
    """A copy of the network whose tensors are exchanged in place; one a thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self._owners: dict[str, list[tuple[nn.Module, str, Sizes]]] = {}
        shared: dict[int, str] = {}
        for path, module in self.model.named_modules():
            sizes = read_sizes(module)
            for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    name = f"{path}.{local}" if path else local
                    self._owners.setdefault(shared.setdefault(id(tensor), name), []).append(
                        (module, local, sizes)
                    )

    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Puts tensors of any shape in place and returns the network."""
        touched: dict[nn.Module, Sizes] = {}
        for name, tensor in tensors.items():
            owners = self._owners[name]
            if owners[0][1] in owners[0][0]._parameters:
                # nn.Parameter(tensor, requires_grad=False), in a third of its time.
                parameter = torch.Tensor._make_subclass(nn.Parameter, tensor, False)
                for module, local, sizes in owners:
                    module._parameters[local] = parameter
                    touched[module] = sizes
            else:
                for module, local, sizes in owners:
                    module._buffers[local] = tensor
                    touched[module] = sizes
        for module, sizes in touched.items():
            sync_attributes(module, sizes)
        return self.model


def drops_groups(num_channels: int, groups: int) -> bool:
    """Whether a grouped layer of `num_channels` inputs loses whole parts rather than lanes.

    Many narrow parts (depthwise, ResNeXt's 32 x 4) stay or go whole, and the layer gets fewer of
    them; of few wide parts each keeps the same places.
    """
    return groups >= num_channels // groups


@dataclass(frozen=True)
class Sizes:
    """What a module was before any cut: its integer attributes, and the shapes of its tensors."""

    attributes: dict[str, int]
    shapes: dict[str, torch.Size]


def read_sizes(module: nn.Module) -> Sizes:
    """The sizes of a module's own attributes and tensors."""
    own = {**module._parameters, **module._buffers}
    return Sizes(
        {name: value for name, value in vars(module).items() if type(value) is int},
        {name: tensor.shape for name, tensor in own.items() if tensor is not None},
    )


def sync_attributes(module: nn.Module, whole: Sizes) -> None:
    """Sets the sizes that a layer's forward or repr reads to those of its tensors.

    Args:
        module: With its new tensors.
        whole: As it was before any cut.
    """
    before = whole.attributes
    # Past nn.Module's own attribute access, which is ten times slower.
    own = vars(module)
    if isinstance(module, nn.modules.conv._ConvNd):
        _sync_convolution(module, before, own)
    elif isinstance(module, nn.Linear):
        own["out_features"], own["in_features"] = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        if (line := own["_buffers"]["running_mean"]) is None:
            line = own["_parameters"]["weight"]
        if line is not None:
            own["num_features"] = line.shape[0]
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        channels, groups = before["num_channels"], before["num_groups"]
        module.num_channels = len(module.weight)
        if groups > 1 and drops_groups(channels, groups):
            module.num_groups = module.num_channels // (channels // groups)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)
    else:
        _sync_by_value(module, whole)


def _sync_convolution(
    module: nn.modules.conv._ConvNd, before: Mapping[str, int], own: dict[str, Any]
) -> None:
    if (weight := own["_parameters"].get("weight")) is None:  # parametrized
        weight = module.weight
    first, second = weight.shape[:2]
    groups, inputs, outputs = before["groups"], before["in_channels"], before["out_channels"]
    if groups > 1:
        if drops_groups(inputs, groups):
            own["groups"] = first // ((inputs if own["transposed"] else outputs) // groups)
        second *= own["groups"]
    if own["transposed"]:
        first, second = second, first
    own["in_channels"], own["out_channels"] = second, first


def _sync_by_value(module: nn.Module, whole: Sizes) -> None:
    """A layer of the user's own: attributes that had the size of a cut dimension get the new one.

    Where two dimensions of that size were cut differently none is changed; trying the plan out
    finds what this gets wrong.
    """
    new: dict[int, set[int]] = {}
    for name, tensor in {**module._parameters, **module._buffers}.items():
        if tensor is not None:
            for old, size in zip(whole.shapes[name], tensor.shape, strict=True):
                new.setdefault(old, set()).add(size)
    for name, value in whole.attributes.items():
        sizes = new.get(value, {value})
        setattr(module, name, next(iter(sizes)) if value > 1 and len(sizes) == 1 else value)


def build_subnet(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """An independent network with copies of `tensors`, ready to be trained or saved."""
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    small = Skeleton(model).load(copies)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(flags[name])
    return small
