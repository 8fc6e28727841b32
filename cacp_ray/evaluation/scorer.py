"""Model + data -> score(candidate): the hot path.

A score costs little more than the forward pass of the small network.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.fusion import FusedNetwork, fuse
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.evaluation.preparation import Cutter, Cutters, Prepared
from cacp_ray.evaluation.racing import (
    decode_hits,
    encode_hits,
    estimate,
    has_fallen_behind,
    prefixes,
)
from cacp_ray.pruning.surgery import Slicer
from cacp_ray.training.metrics import fast_dtype, score_logits

CHECKED_IMAGES = 4
BATCH_PIXELS = 2**19  # larger batches are no faster, and their memory is the evaluators' most
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class FastNetwork:
    """Keep counts -> logits, as fast as this CPU allows: fused where that gives the same logits."""

    def __init__(self, cutter: Cutter, dtype: torch.dtype) -> None:
        self._cutter, self._dtype = cutter, dtype
        fused = fuse(cutter.skeleton.model)
        self._fused = fused if fused is not None and _agrees(fused, cutter, dtype) else None

    def load(
        self, keep_counts: Sequence[int], batch_size: int | None = None
    ) -> Callable[[ImageSet], Tensor]:
        """Images -> logits (N, classes) float32 of the network; valid until the next call."""
        tensors = self._cutter.cut(keep_counts)
        if self._fused is None:
            model, dtype = self._cutter.skeleton.load(tensors), torch.float32
            autocast = torch.autocast("cpu", dtype=self._dtype, enabled=self._dtype != dtype)
        else:
            model, dtype = self._fused.load({**self._cutter.tensors, **tensors}), self._dtype
            autocast = torch.autocast("cpu", enabled=False)

        def predict(split: ImageSet) -> Tensor:
            size = batch_size or default_batch_size(split)
            with torch.inference_mode(), autocast:
                batches = (split.slice(i, i + size) for i in range(0, len(split), size))
                return torch.cat([model(each.tensors()[0].to(dtype)).float() for each in batches])

        return predict


def default_batch_size(split: ImageSet) -> int:
    """As many images as hold `BATCH_PIXELS`."""
    return max(1, BATCH_PIXELS // math.prod(split.images.shape[1:3]))


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room: CUDA has an error of its own, the CPU's allocator has none."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


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
        tolerance = 1e-3 * float(expected.nan_to_num().abs().max())
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

    The function raises EvaluationError where the network's outputs are not finite. Out of memory,
    it halves its batches, once, and says so in the measurement's `error`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    cutters = Cutters(prepared, recovery)
    precision = read_dtype(dtype)
    networks: dict[str, FastNetwork] = {}  # by importance order
    size = batch_size or default_batch_size(split)
    is_halved = False

    def score(candidate: Candidate) -> Measurement:
        nonlocal size, is_halved
        try:
            return score_once(candidate)
        except Exception as error:
            if is_halved or size < 2 or not is_out_of_memory(error):
                raise
        size, is_halved = size // 2, True
        found = score_once(candidate)
        # Of no failure, but whoever runs the search should know.
        return dataclasses.replace(found, error=f"out of memory: batches of {size} from now on")

    def score_once(candidate: Candidate) -> Measurement:
        started = time.perf_counter()
        if candidate.order not in networks:
            networks[candidate.order] = FastNetwork(cutters[candidate.order], precision)
        network = networks[candidate.order].load(candidate.keep_counts, size)
        scored = split.take(candidate.images or images)
        logits = _race(network, scored, candidate.best)
        labels = from_shared(scored.labels[: len(logits)])
        accuracy = score_logits(logits, labels)
        if not math.isfinite(accuracy.loss):
            raise EvaluationError(f"the network's outputs are not finite (loss {accuracy.loss})")
        found = Measurement(
            index=candidate.index,
            top1=accuracy.top1,
            top5=accuracy.top5,
            loss=accuracy.loss,
            images=accuracy.images,
            seconds=time.perf_counter() - started,
            finished_at=time.time(),
        )
        hits = (logits.argmax(1) == labels).numpy()
        if len(logits) == len(split.take(images)):
            return dataclasses.replace(found, hits=encode_hits(hits))
        if len(logits) < len(scored):
            top1 = estimate(hits, decode_hits(candidate.best))
            return dataclasses.replace(found, top1=top1, status="stopped")
        return found

    return score


def _race(network: Callable[[ImageSet], Tensor], split: ImageSet, encoded: str) -> Tensor:
    """Logits on the split, or on the prefix where the network fell behind the best."""
    if not encoded:
        return network(split)
    best = decode_hits(encoded)
    logits, done = [], 0
    for stop in prefixes(len(split)):
        logits.append(network(split.slice(done, stop)))
        done = stop
        so_far = torch.cat(logits)
        hits = (so_far.argmax(1) == from_shared(split.labels[:done])).numpy()
        if has_fallen_behind(hits, best[:done]):
            return so_far
    return torch.cat([*logits, network(split.slice(done, None))])
