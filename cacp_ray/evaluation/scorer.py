"""Model + data -> score(keep counts): the hot path.

`prepare` does once what all candidates share (importance order, factors) and returns plain arrays,
which evaluators read from shared memory. A score then costs little more than the forward pass of
the small network.
"""

import hashlib
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.evaluation.fusion import FusedNetwork, fuse
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.pruning.compensation import LayerFactors, make_factors
from cacp_ray.pruning.criteria import needs, rank_channels
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.recovery import make_cut
from cacp_ray.pruning.statistics import Statistics
from cacp_ray.pruning.surgery import Skeleton, Slicer, all_tensors, reorder_weights
from cacp_ray.training.metrics import fast_dtype, score_logits

CHECKED_IMAGES = 4
BATCH_PIXELS = 2**19  # larger batches are no faster, and their memory is the evaluators' most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


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
    factors: dict[str, LayerFactors] = {}
    if recovery == "compensate":
        factors = make_factors(plan, ordered, statistics.inputs, orders)
    return Prepared(
        model=model,
        plan=plan,
        orders=tuple(orders),
        tensors={name: value.numpy() for name, value in ordered.items()},
        factors=factors,
        calibration=calibration,
    )


class Cutter:
    """Keep counts -> network, repaired; holds the tensors of one process."""

    def __init__(self, prepared: Prepared, recovery: str) -> None:
        self.plan = prepared.plan
        self.skeleton = Skeleton(prepared.model)
        self.calibration = prepared.calibration
        tensors = {name: from_shared(value) for name, value in prepared.tensors.items()}
        # What is not exchanged with every candidate is copied: a forward pass may write to it, as
        # BN layers in training mode do to their batch counters, and shared memory is read-only.
        followed = {name for name, _ in self.plan.axes}
        tensors |= {name: t.clone() for name, t in tensors.items() if name not in followed}
        self.skeleton.load(tensors)
        self.skeleton.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        tensors = {
            name: t.contiguous(memory_format=torch.channels_last) if t.ndim == 4 else t
            for name, t in tensors.items()
        }
        self.tensors: Mapping[str, Tensor] = tensors
        calibration = prepared.calibration.tensors()[0] if recovery == "bn" else None
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

    def __init__(self, prepared: Prepared, recovery: str) -> None:
        super().__init__({"": Cutter(prepared, recovery)})
        self._prepared, self._recovery = prepared, recovery

    def __missing__(self, order: str) -> Cutter:
        self[order] = Cutter(self._prepared.with_order(order), self._recovery)
        return self[order]


class FastNetwork:
    """Keep counts -> logits, as fast as this CPU allows: fused where that gives the same logits."""

    def __init__(self, cutter: Cutter, dtype: torch.dtype) -> None:
        self._cutter, self._dtype = cutter, dtype
        fused = fuse(cutter.skeleton.model)
        self._fused = fused if fused is not None and _agrees(fused, cutter, dtype) else None

    def logits(
        self, keep_counts: Sequence[int], split: ImageSet, batch_size: int | None = None
    ) -> Tensor:
        """(N, classes) float32 on a split."""
        tensors = self._cutter.cut(keep_counts)
        if self._fused is None:
            model, dtype = self._cutter.skeleton.load(tensors), torch.float32
            autocast = torch.autocast("cpu", dtype=self._dtype, enabled=self._dtype != dtype)
        else:
            model, dtype = self._fused.load({**self._cutter.tensors, **tensors}), self._dtype
            autocast = nullcontext()
        with torch.inference_mode(), autocast:
            size = batch_size or max(1, BATCH_PIXELS // math.prod(split.images.shape[1:3]))
            batches = (split.slice(i, i + size) for i in range(0, len(split), size))
            return torch.cat([model(each.tensors()[0].to(dtype)).float() for each in batches])


def _agrees(fused: FusedNetwork, cutter: Cutter, dtype: torch.dtype) -> bool:
    """Whether whole and cut networks compute the same when fused; sets its dtype."""
    images = cutter.calibration.take(CHECKED_IMAGES).tensors()[0]
    whole = cutter.plan.cost_model.num_channels
    slicer = Slicer(cutter.plan)
    for counts in (whole, np.maximum(cutter.plan.least_counts, whole // 2)):
        tensors = {**cutter.tensors, **slicer(cutter.tensors, counts.tolist())}
        try:
            with torch.inference_mode():
                expected = cutter.skeleton.load(tensors)(images)
                found = fused.load(tensors)(images)
                fused.dtype = dtype
                fused.load(tensors)(images.to(dtype))
        except Exception:  # sizes or dtypes that the traced graph holds as constants
            return False
        tolerance = 1e-3 * float(expected.abs().max())
        if not torch.allclose(found, expected, rtol=1e-3, atol=tolerance, equal_nan=True):
            return False
        fused.dtype = torch.float32
    fused.dtype = dtype
    return True


def read_dtype(name: str) -> torch.dtype:
    """Of a setting: `auto` (bfloat16 where the CPU has it), `float32` or `bfloat16`."""
    return fast_dtype() if name == "auto" else DTYPES[name]


def make_scorer(
    prepared: Prepared,
    split: ImageSet,
    *,
    recovery: str,
    batch_size: int | None = None,
    dtype: str,
    images: int | None = None,
    threads: int | None = None,
) -> ScoreFunction:
    """A function that scores candidates on the search split.

    Args:
        prepared: Of the network.
        split: The search split, in a fixed order.
        recovery: `none`, `bn` or `compensate`.
        batch_size: Images a forward pass; by default as many as hold `BATCH_PIXELS`.
        dtype: See `read_dtype`.
        images: Of the split's beginning that score a candidate which does not say how many.
        threads: For torch in this process; None leaves them alone.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    cutters = Cutters(prepared, recovery)
    precision = read_dtype(dtype)
    networks: dict[str, FastNetwork] = {}  # by importance order

    def score(candidate: Candidate) -> Measurement:
        started = time.perf_counter()
        if candidate.order not in networks:
            networks[candidate.order] = FastNetwork(cutters[candidate.order], precision)
        scored = split.take(candidate.images or images)
        logits = networks[candidate.order].logits(candidate.keep_counts, scored, batch_size)
        accuracy = score_logits(logits, from_shared(scored.labels))
        return Measurement(
            index=candidate.index,
            top1=accuracy.top1,
            top5=accuracy.top5,
            loss=accuracy.loss,
            images=accuracy.images,
            seconds=time.perf_counter() - started,
            finished_at=time.time(),
        )

    return score


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and values of a state dict."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().contiguous().numpy()
        digest.update(f"{name}{value.dtype}{value.shape}".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
