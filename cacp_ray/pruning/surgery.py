"""From keep counts to a physically small network, with no copy or trace a candidate.

The weights are permuted once into importance order. A subnet keeps the first K channels of each
group, so almost every small tensor is a leading slice, a view, of the permuted one.
"""

import copy
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.pruning.plan import Plan

Orders = Sequence[NDArray[np.int64]]


def reorder_weights(plan: Plan, tensors: Mapping[str, Tensor], orders: Orders) -> dict[str, Tensor]:
    """The state dict of the same network with each group's channels in importance order.

    Args:
        plan: Of the network.
        tensors: Its state dict.
        orders: Per group a permutation (C,), best channel first.
    """
    result = dict(tensors)
    for (name, dim), axis in plan.axes.items():
        index = torch.from_numpy(axis.reordered(orders))
        result[name] = result[name].index_select(dim, index)
    return result


class Slicer:
    """Cuts reordered tensors to keep counts; views where the kept positions lead."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._leading = {
            key: (group, axis.multiplicity)
            for key, axis in plan.axes.items()
            if (group := axis.single_group) is not None
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
        return tensor.index_select(dim, torch.from_numpy(positions))

    def __call__(
        self, tensors: Mapping[str, Tensor], keep_counts: Sequence[int]
    ) -> dict[str, Tensor]:
        """Small tensors for every name that follows a group; the others are not returned."""
        small: dict[str, Tensor] = {}
        for name, dim in self._plan.axes:
            small[name] = self.cut(name, dim, small.get(name, tensors[name]), keep_counts)
        return small


class Skeleton:
    """A copy of the network whose tensors are exchanged in place; one a thread."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self._owners: dict[str, list[tuple[nn.Module, str]]] = {}
        shared: dict[int, str] = {}
        for path, module in self.model.named_modules():
            for local, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    name = f"{path}.{local}" if path else local
                    self._owners.setdefault(shared.setdefault(id(tensor), name), []).append(
                        (module, local)
                    )

    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Puts tensors of any shape in place and returns the network."""
        touched: dict[int, nn.Module] = {}
        for name, tensor in tensors.items():
            for module, local in self._owners[name]:
                if local in module._parameters:
                    module._parameters[local] = nn.Parameter(tensor, requires_grad=False)
                else:
                    module._buffers[local] = tensor
                touched[id(module)] = module
        for module in touched.values():
            sync_attributes(module)
        return self.model


def sync_attributes(module: nn.Module) -> None:
    """Sets the sizes that a layer's forward or repr reads to those of its tensors."""
    if isinstance(module, nn.Conv2d):
        weight, groups = module.weight, module.groups
        if groups > 1 and weight.shape[1] == 1:  # depthwise: one filter set a channel
            module.groups = weight.shape[0] // (module.out_channels // groups)
        module.out_channels = weight.shape[0]
        module.in_channels = weight.shape[1] * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        module.num_features = len(module.running_mean)
    elif isinstance(module, nn.GroupNorm) and module.weight is not None:
        module.num_channels = len(module.weight)
    elif isinstance(module, nn.LayerNorm) and module.weight is not None:
        module.normalized_shape = tuple(module.weight.shape)


def build_subnet(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """An independent network with copies of `tensors`, ready to be trained or saved."""
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    small = Skeleton(model).load(copies)
    small.requires_grad_(True)
    return small
