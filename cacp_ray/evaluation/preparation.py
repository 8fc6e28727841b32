"""Model + data -> what all candidates of a network share, and keep counts -> the cut network.

`prepare` does once what does not depend on the candidate (importance order, factors) and returns
plain arrays, which evaluators read from shared memory.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.memory import give_back_memory
from cacp_ray.pruning.compensation import LayerFactors, make_factors
from cacp_ray.pruning.criteria import needs, rank_channels
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.recovery import make_cut
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.surgery import Skeleton, all_tensors, reorder_weights


@dataclass(frozen=True)
class Prepared:
    """What every candidate of one network shares.

    Attributes:
        model: The base network.
        plan: How it may be cut.
        orders: Per group a permutation (C,), best channel first.
        tensors: Its state dict in importance order, as arrays.
        factors: Compensation factors by weight name; empty for other recoveries.
        calibration: Training images.
        others: The same with other importance orders, by criterion, for candidates that name one.
    """

    model: nn.Module
    plan: Plan
    orders: tuple[NDArray[np.int64], ...]
    tensors: dict[str, NDArray[Any]]
    factors: dict[str, LayerFactors]
    calibration: ImageSet
    others: Mapping[str, "Prepared"] = field(default_factory=dict)

    def with_order(self, order: str) -> "Prepared":
        """For a candidate's importance order; empty means the run's own."""
        return self.others[order] if order else self


def needed_kinds(criterion: str, recovery: str) -> frozenset[str]:
    """Kinds of statistics that a criterion and a recovery read.

    Raises:
        ConfigError: Unknown criterion.
    """
    return needs(criterion) | ({"inputs"} if recovery == "compensate" else set())


def prepare(
    model: nn.Module,
    plan: Plan,
    calibration: ImageSet,
    statistics: Statistics,
    *,
    criterion: str,
    recovery: str,
    seed: int,
    orders: Sequence[NDArray[np.int64]] | None = None,
) -> Prepared:
    """Ranks the channels and factors for the compensation.

    Args:
        model: The base network.
        plan: Of `model`.
        calibration: Training images.
        statistics: Of `calibration`, of `needed_kinds`.
        criterion: Makes the importance order.
        recovery: `none`, `bn` or `compensate`.
        seed: Of the `random` order.
        orders: An importance order made before, instead of `criterion`.

    Raises:
        ConfigError: Unknown criterion.
    """
    tensors = all_tensors(model)
    if orders is None:
        orders = rank_channels(criterion, plan, tensors, statistics, seed)
    ordered = reorder_weights(plan, tensors, orders)
    give_back_memory()  # each step frees as much as it keeps
    factors: dict[str, LayerFactors] = {}
    if recovery == "compensate":
        factors = make_factors(plan, ordered, statistics.inputs, orders)
        give_back_memory()
    return Prepared(
        model=model,
        plan=plan,
        orders=tuple(orders),
        tensors={name: value.numpy() for name, value in ordered.items()},
        factors=factors,
        calibration=calibration,
    )


class Cutter:
    """Keep counts -> network, repaired; holds the tensors of one process, on one device."""

    def __init__(self, prepared: Prepared, recovery: str, device: str = "cpu") -> None:
        self.plan, self.device = prepared.plan, device
        self.skeleton = Skeleton(prepared.model)
        self.calibration = prepared.calibration
        tensors = {name: from_shared(value).to(device) for name, value in prepared.tensors.items()}
        # What is not exchanged with every candidate is copied: a forward pass may write to it, as
        # BN layers in training mode do to their batch counters, and shared memory is read-only.
        followed = {name for name, _ in self.plan.axes}
        tensors |= {name: t.clone() for name, t in tensors.items() if name not in followed}
        self.skeleton.load(tensors)
        self.skeleton.model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        tensors = {
            name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in tensors.items()
        }
        self.tensors: Mapping[str, Tensor] = tensors
        calibration = prepared.calibration.tensors()[0].to(device) if recovery == "bn" else None
        self.cut = make_cut(
            recovery,
            self.plan,
            tensors,
            factors=prepared.factors,
            skeleton=self.skeleton,
            calibration=calibration,
        )

    def load(self, keep_counts: Sequence[int]) -> nn.Module:
        """The network at `keep_counts`; valid until the next call."""
        return self.skeleton.load(self.cut(keep_counts))


class Cutters(dict[str, Cutter]):
    """A cutter an importance order, made when it is first asked for."""

    def __init__(self, prepared: Prepared, recovery: str, device: str = "cpu") -> None:
        super().__init__({"": Cutter(prepared, recovery, device)})
        self._prepared, self._recovery, self._device = prepared, recovery, device

    def __missing__(self, order: str) -> Cutter:
        self[order] = Cutter(self._prepared.with_order(order), self._recovery, self._device)
        return self[order]


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().numpy()
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
