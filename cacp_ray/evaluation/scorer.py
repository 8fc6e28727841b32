"""Scores candidates: the hot path.

A score costs little more than the forward pass of the small network.
"""

import dataclasses
import math
import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.errors import EvaluationError, is_out_of_memory
from cacp_ray.evaluation import racing
from cacp_ray.evaluation.classification import Classification, as_scored
from cacp_ray.evaluation.gpu import (
    TRIED_IMAGES,
    Need,
    find_need,
    fit_batch,
    gpu_batch_size,
    measure_image,
    measure_peak,
    open_gpu,
)
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.evaluation.network import FastNetwork, Pixels, Predict, default_batch_size, put_pixels
from cacp_ray.evaluation.preparation import CutNetwork, Prepared
from cacp_ray.io.environment import give_back_memory
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.training.metrics import fast_dtype, find_hits, score_logits

TRIM_SECONDS = 1.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """The dtype of `auto` (bfloat16 where the device supports it), `float32` or `bfloat16`."""
    return fast_dtype(device) if name == "auto" else DTYPES[name]


class Scorer:
    """Scores candidates on the search split; a `ScoreFunction`."""

    def __init__(
        self,
        prepared: Prepared,
        split: ImageSet,
        *,
        recovery: str,
        batch_size: int | None = None,
        dtype: str,
        images: int | None = None,
        threads: int | None = None,
        gpu: float = 0.0,
    ) -> None:
        """Loads network and split onto the device that scores.

        `split` is in a fixed order; its prefix of `images` scores a candidate without a number of
        images. The default batch size suits a CPU's caches or a GPU's memory. `dtype` is read by
        `read_dtype`; `gpu` is a share of a GPU's memory, and 0 scores on the CPU.

        Raises:
            EvaluationError: torch cannot use a GPU here, or the share of its memory is too small.
        """
        self._made_by = partial(
            Scorer,
            prepared,
            split,
            recovery=recovery,
            batch_size=batch_size,
            dtype=dtype,
            images=images,
            threads=threads,
            gpu=gpu,
        )
        if threads is not None:
            torch.set_num_threads(threads)
        if gpu:
            open_gpu(gpu)
        try:
            self._loaded = _load(prepared, split, recovery, dtype, "cuda" if gpu else "cpu")
            self._batch_size = batch_size or default_batch_size(split)
            if gpu and batch_size is None:
                image_bytes = measure_image(self._loaded.load_whole(), self._loaded.pixels)
                self._batch_size = fit_batch(image_bytes, len(split), gpu, self._loaded.kept)
        except torch.OutOfMemoryError as error:
            raise EvaluationError(
                f"network and search split do not fit into {gpu:g} of the GPU's memory: set "
                "cluster.gpus_per_evaluator to a larger share"
            ) from error
        self._labels = from_shared(split.labels)
        self._default_images = len(split.take(images))
        self._is_halved = False
        self._trimmed_at = time.monotonic()

    def __reduce__(self) -> tuple["partial[Scorer]", tuple[()]]:
        """Another process loads network and split anew."""
        return self._made_by, ()

    def __call__(self, candidate: Candidate) -> Measurement:
        """Scores a candidate.

        The first time that memory runs out, batches are halved for good, and the measurement's
        `error` says so.

        Raises:
            EvaluationError: The network's outputs are not finite.
        """
        if time.monotonic() - self._trimmed_at > TRIM_SECONDS:
            give_back_memory()
            self._trimmed_at = time.monotonic()
        try:
            return self._score(candidate)
        except Exception as error:
            if self._is_halved or self._batch_size < 2 or not is_out_of_memory(error):
                raise
        self._batch_size, self._is_halved = self._batch_size // 2, True
        measurement = self._score(candidate)
        remark = f"out of memory: batches of {self._batch_size} from now on"
        return dataclasses.replace(measurement, error=remark)

    def _score(self, candidate: Candidate) -> Measurement:
        started = time.perf_counter()
        network = self._loaded.network(candidate.criterion)
        predict = network.load(candidate.keep_counts, self._batch_size)
        wanted = min(candidate.images or self._default_images, len(self._labels))
        logits = _race(predict, self._loaded.pixels, self._labels[:wanted], candidate.opponent)
        images = len(logits)
        labels = self._labels[:images]
        accuracy = score_logits(logits, labels)
        if not math.isfinite(accuracy.loss):
            raise EvaluationError(f"the network's outputs are not finite (loss {accuracy.loss})")
        measurement = Measurement(
            index=candidate.index,
            **vars(as_scored(accuracy)),
            seconds=time.perf_counter() - started,
            finished_at=time.time(),
        )
        hits = find_hits(logits, labels).numpy()
        if images == self._default_images:
            return dataclasses.replace(measurement, hits=racing.encode_hits(hits))
        if images < wanted:
            score = racing.estimate(hits, racing.decode_hits(candidate.opponent))
            return dataclasses.replace(measurement, score=score, status="stopped")
        return measurement


def measure_task_need(prepared: Prepared, task: Classification, **settings: Any) -> Need:
    """`measure_need` of the built-in task."""
    return measure_need(prepared, task.split, **settings)


def measure_need(
    prepared: Prepared,
    split: ImageSet,
    *,
    recovery: str,
    batch_size: int | None = None,
    dtype: str,
    **_others: object,
) -> Need:
    """Memory of an evaluator, measured on a GPU that this process has for itself.

    The arguments are those of `Scorer`.

    Raises:
        EvaluationError: torch cannot use a GPU here, or it is too small for one evaluator.
    """
    open_gpu(1.0)
    try:
        loaded = _load(prepared, split, recovery, dtype, "cuda")
        predict, repair_bytes = measure_peak(loaded.load_whole)
        image_bytes = measure_image(predict, loaded.pixels)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            "network and search split do not fit into a GPU's memory: set data.search to fewer "
            "images, or cluster.gpus_per_evaluator to 0"
        ) from error
    batch = batch_size or gpu_batch_size(math.prod(split.images.shape[1:3]), len(split))
    return find_need(image_bytes, batch, loaded.kept, repair_bytes)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """Networks and pixels, on the device that scores."""

    network: Callable[[str], FastNetwork]  # by criterion, made on demand; empty for the run's own
    whole: list[int]  # channels of the whole network
    pixels: Pixels
    kept: int  # bytes that later scoring will hold in addition

    def load_whole(self) -> Predict:
        """The whole network, which takes the most memory, in batches of `TRIED_IMAGES`."""
        return self.network("").load(self.whole, TRIED_IMAGES)


def _load(prepared: Prepared, split: ImageSet, recovery: str, dtype: str, device: str) -> _Loaded:
    precision = read_dtype(dtype, device)

    @cache
    def network(criterion: str) -> FastNetwork:
        return FastNetwork(CutNetwork(prepared.with_order(criterion), recovery, device), precision)

    # A GPU loads all orders at once, so that their memory is known from the start.
    criteria = ("", *prepared.others) if device == "cuda" else ("",)
    for criterion in criteria:
        network(criterion)
    kept = CACHE_BYTES * len(criteria) if recovery == "compensate" else 0
    whole = prepared.plan.cost_model.num_channels.tolist()
    return _Loaded(network, whole, put_pixels(split, device), kept)


def _race(predict: Predict, pixels: Pixels, labels: Tensor, opponent: str) -> Tensor:
    """Logits of all labelled images, or of a prefix where the network fell behind its opponent."""
    if not opponent:
        return predict(pixels, 0, len(labels))
    best = racing.decode_hits(opponent)
    parts: list[Tensor] = []
    done = 0
    for stop in racing.prefixes(len(labels)):
        parts.append(predict(pixels, done, stop))
        done = stop
        logits = torch.cat(parts)
        hits = find_hits(logits, labels[:done]).numpy()
        if racing.has_fallen_behind(hits, best[:done]):
            return logits
    return torch.cat([*parts, predict(pixels, done, len(labels))])
