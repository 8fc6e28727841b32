"""From keep counts to small tensors, with no copy or trace for each candidate.

The weights are permuted once into importance order. A subnet keeps the first K channels of each
group, so almost every small tensor is a leading slice, a view, of the permuted one.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.pruning.plan import Plan

Orders = Sequence[NDArray[np.int64]]  # permutation (C,) of each group, best channel first


def all_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, also those that the state dict leaves out; shared ones once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named}


def reorder_weights(plan: Plan, tensors: Mapping[str, Tensor], orders: Orders) -> dict[str, Tensor]:
    """The tensors of the same network with each group's channels in importance order."""
    result = dict(tensors)
    for (name, dim), axis in plan.axes.items():
        index = torch.as_tensor(axis.reordered(orders))
        result[name] = result[name].index_select(dim, index.to(result[name].device))
    return result


class Cutter:
    """Cuts reordered tensors to keep counts; views where the kept positions lead."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._leading = {
            key: (group, axis.multiplicity)
            for key, axis in plan.axes.items()
            if (group := axis.single_group) is not None
        }
        # Tensors whose kept positions lead in every dimension are cut by one call each.
        dims_of: dict[str, list[int]] = {}
        for name, dim in plan.axes:
            dims_of.setdefault(name, []).append(dim)
        self._views = {
            name: [(dim, *self._leading[name, dim]) for dim in dims]
            for name, dims in dims_of.items()
            if all((name, dim) in self._leading for dim in dims)
        }

    def size(self, name: str, dim: int, keep_counts: Sequence[int]) -> int | None:
        """Kept positions of a dimension where they lead, else None."""
        if (name, dim) not in self._leading:
            return None
        group, multiplicity = self._leading[name, dim]
        return keep_counts[group] * multiplicity

    def cut(self, name: str, dim: int, tensor: Tensor, keep_counts: Sequence[int]) -> Tensor:
        """Cuts one dimension of a reordered tensor."""
        size = self.size(name, dim, keep_counts)
        if size is not None:
            return tensor.narrow(dim, 0, size)
        if (name, dim) not in self._plan.axes:
            return tensor
        positions = self._plan.axes[name, dim].positions(keep_counts)
        return tensor.index_select(dim, torch.as_tensor(positions).to(tensor.device))

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
            if name not in self._views:
                small[name] = self.cut(name, dim, small.get(name, tensors[name]), keep_counts)
        return small
