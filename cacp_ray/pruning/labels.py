"""Labels of channels, and which of them belong together."""

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.pruning.torch_types import broadcast

NEUTRAL = 0  # constants and padding, which unite with anything
FROZEN = 1  # channels that stay whole


class LabelSets:
    """Disjoint sets of labels, united in bulk; the smallest label stands for its set."""

    def __init__(self) -> None:
        self._parent = np.arange(2, dtype=np.int64)
        self.reasons: dict[int, str] = {}  # why channels stay whole
        self.summed: set[int] = set()  # labels that a sum of several layers' outputs united
        self.normalised: set[int] = set()  # labels of `mark_normalised`

    def new(self, count: int) -> Tensor:
        """(count,) fresh labels."""
        first = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(first, first + count)])
        return torch.arange(first, first + count)

    def find(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """The label that stands for each label's set, in the same shape."""
        if labels.ndim == 0:
            return self.find(labels.reshape(1)).reshape(())
        roots = self._parent[labels]
        while True:
            above = self._parent[roots]
            if np.array_equal(above, roots):
                self._parent[labels] = roots
                return roots
            roots = above

    def unite(self, first: Tensor, second: Tensor, *, is_sum: bool = False) -> Tensor:
        """Unites labels element by element (broadcast); returns the labels of the result."""
        first, second = broadcast(first, second)
        a, b = _drop_repeats(first, second)
        merged = torch.where(a == NEUTRAL, b, a).expand(first.shape)
        pairs = np.stack([a.numpy().ravel(), b.numpy().ravel()])
        pairs = pairs[:, (pairs != NEUTRAL).all(0)]
        while True:
            low, high = np.sort(self.find(pairs), axis=0)
            low, high = low[low != high], high[low != high]
            if len(low) == 0:
                return merged
            if is_sum:
                self.summed.update(low[low != FROZEN].tolist())
            if len(frozen := high[low == FROZEN]):
                self._freeze(frozen, "meets channels that stay whole")
            else:
                np.minimum.at(self._parent, high, low)

    def unite_along(self, labels: Tensor, dim: int) -> Tensor:
        """Unites all labels along a dimension; returns those that remain, without it."""
        first = labels.select(dim, 0)
        for place in range(1, labels.shape[dim]):
            first = self.unite(first, labels.select(dim, place))
        return first

    def mark_normalised(self, labels: Tensor) -> None:
        """Records that what is computed from these channels depends on how many there are."""
        self.normalised.update(np.unique(compact(labels).numpy()).tolist())

    def roots(self, labels: Iterable[int]) -> set[int]:
        """The labels that stand for the sets of some labels."""
        return set(self.find(np.array(sorted(labels), dtype=np.int64)).tolist())

    def freeze(self, labels: Tensor, reason: str) -> None:
        """Marks channels, and all channels of their sets, as staying whole."""
        self._freeze(self.find(compact(labels).numpy().ravel()), reason)

    def _freeze(self, roots: NDArray[np.int64], reason: str) -> None:
        is_meant = np.zeros(len(self._parent), dtype=bool)
        is_meant[roots] = True
        is_meant[: FROZEN + 1] = False
        if is_meant.any():
            root_of = self.find(np.arange(len(self._parent)))
            meant: list[int] = np.flatnonzero(is_meant[root_of]).tolist()
            self.reasons.update(dict.fromkeys(meant, reason))
            self._parent[is_meant] = FROZEN


def compact(labels: Tensor) -> Tensor:
    """The same labels without repetition along expanded dimensions."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def varying_dims(labels: Tensor) -> list[int]:
    """Dimensions along which the label changes, padding and constants aside."""
    labels = compact(labels)
    varying: list[int] = []
    for dim in range(labels.ndim):
        if labels.shape[dim] > 1:
            largest = labels.amax(dim, keepdim=True)
            if bool(((labels != largest) & (labels != NEUTRAL)).any()):
                varying.append(dim)
    return varying


def split_dim(labels: Tensor, dim: int, parts: int) -> Tensor:
    """A view of (..., size, ...) as (..., parts, size / parts, ...)."""
    size = labels.shape[dim] // parts
    return labels.view(*labels.shape[:dim], parts, size, *labels.shape[dim + 1 :])


def _drop_repeats(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    for dim in range(first.ndim):
        if first.shape[dim] > 1 and first.stride(dim) == second.stride(dim) == 0:
            first, second = first.narrow(dim, 0, 1), second.narrow(dim, 0, 1)
    return first, second
