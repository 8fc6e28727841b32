"""What all candidates of a network share, and the network at any keep counts.

`prepare` does once what does not depend on the candidate (importance order, factors) and returns
plain arrays, which evaluators read from shared memory. `CutNetwork` makes candidates from them.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.data.transforms import from_shared
from cacp_ray.io.environment import give_back_memory
from cacp_ray.pruning.calibration import Calibration, inputs_in_parts
from cacp_ray.pruning.compensation import LayerFactors, make_factors
from cacp_ray.pruning.criteria import needs, rank_channels
from cacp_ray.pruning.inputs import map_inputs
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.recovery import make_recovery
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.surgery import all_tensors, reorder_weights
from cacp_ray.pruning.torch_types import as_channels_last

BN_BATCH = 250  # most images for one update of BN statistics


@dataclass(frozen=True)
class Prepared:
    """What every candidate of one network shares."""

    model: nn.Module  # the base network
    plan: Plan  # how it may be cut
    orders: tuple[NDArray[np.int64], ...]  # permutation (C,) of each group, best channel first
    tensors: dict[str, NDArray[Any]]  # state dict in importance order, as arrays
    factors: dict[str, LayerFactors]  # by weight name; empty for recoveries other than `compensate`
    calibration: Calibration  # training examples
    # The same network in other importance orders, by criterion, for candidates that name one.
    others: Mapping[str, "Prepared"] = field(default_factory=dict[str, "Prepared"])

    def with_order(self, order: str) -> "Prepared":
        """The network in a candidate's importance order; an empty name means the run's own."""
        return self.others[order] if order else self


def needed_kinds(criterion: str, recovery: str) -> frozenset[str]:
    """Kinds of statistics that a criterion and a recovery read.

    Raises:
        ConfigError: Unknown criterion.
    """
    return needs(criterion) | ({"inputs"} if recovery == "compensate" else set[str]())


def prepare(
    model: nn.Module,
    plan: Plan,
    calibration: Calibration,
    statistics: Statistics,
    *,
    criterion: str,
    recovery: str,
    seed: int,
    orders: Sequence[NDArray[np.int64]] | None = None,
) -> Prepared:
    """Ranks the channels and makes the compensation factors.

    `statistics` of the training examples `calibration` hold what `needed_kinds` names; `orders` are
    taken instead of the criterion's.

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


class CutNetwork:
    """A network at any keep counts, cut and repaired; it holds its tensors on one device."""

    def __init__(self, prepared: Prepared, recovery: str, device: str = "cpu") -> None:
        self.plan, self.device = prepared.plan, device
        self.resizable = ResizableNetwork(prepared.model)
        self.calibration = prepared.calibration
        tensors = {name: from_shared(value).to(device) for name, value in prepared.tensors.items()}
        # What is not exchanged with every candidate is copied: a forward pass may write to it, as
        # BN layers in training mode do to their batch counters, and shared memory is read-only.
        followed = {name for name, _ in self.plan.axes}
        tensors |= {name: t.clone() for name, t in tensors.items() if name not in followed}
        self.resizable.load(tensors)
        as_channels_last(self.resizable.model.to(device))
        tensors = {
            name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in tensors.items()
        }
        self.tensors: Mapping[str, Tensor] = tensors
        parts = inputs_in_parts(self.calibration, BN_BATCH) if recovery == "bn" else []
        calibration = [map_inputs(lambda x: x.to(device), part) for part in parts]
        self.cut = make_recovery(
            recovery,
            self.plan,
            tensors,
            factors=prepared.factors,
            resizable=self.resizable,
            calibration=calibration,
        )

    def load(self, keep_counts: Sequence[int]) -> nn.Module:
        """The network at `keep_counts`; valid until the next call."""
        return self.resizable.load(self.cut(keep_counts))


def cut_networks(
    prepared: Prepared, recovery: str, device: str = "cpu"
) -> Callable[[str], CutNetwork]:
    """The network in each importance order, made when it is first asked for."""

    @cache
    def cut_network(order: str) -> CutNetwork:
        return CutNetwork(prepared.with_order(order), recovery, device)

    return cut_network


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().numpy()
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
