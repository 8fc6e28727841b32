"""Model + data -> score(candidate): the hot path.

A score costs little more than the forward pass of the small network.
"""

import dataclasses
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.gpu import (
    TRIED_IMAGES,
    Need,
    find_need,
    fit_batch,
    liked_batch,
    measure_image,
    measure_peak,
    open_gpu,
)
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.evaluation.network import FastNetwork, Pixels, default_batch_size, put_pixels
from cacp_ray.evaluation.preparation import Cutters, Prepared
from cacp_ray.evaluation.racing import (
    decode_hits,
    encode_hits,
    estimate,
    has_fallen_behind,
    prefixes,
)
from cacp_ray.memory import give_back_memory
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.training.metrics import fast_dtype, find_hits, score_logits

TRIM_SECONDS = 1.0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device had no room: CUDA has an error of its own, the CPU's allocator has none."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def read_dtype(name: str, device: str = "cpu") -> torch.dtype:
    """Of a setting: `auto` (bfloat16 where the device has it), `float32` or `bfloat16`."""
    return fast_dtype(device) if name == "auto" else DTYPES[name]


def make_scorer(
    prepared: Prepared,
    split: ImageSet,
    *,
    recovery: str,
    batch_size: int | None = None,
    dtype: str,
    images: int | None = None,
    threads: int | None = None,
    gpu: float = 0.0,
) -> ScoreFunction:
    """A function that scores candidates on the search split.

    Args:
        prepared: Of the network.
        split: The search split, in a fixed order.
        recovery: `none`, `bn` or `compensate`.
        batch_size: Images a forward pass; by default as many as a CPU's caches or a GPU's memory
            like.
        dtype: See `read_dtype`.
        images: Of the split's beginning that score a candidate which does not say how many.
        threads: For torch in this process; None leaves them alone.
        gpu: Share of a GPU's memory to score with; 0 scores on the CPU.

    The function raises EvaluationError where the network's outputs are not finite. Out of memory,
    it halves its batches, once, and says so in the measurement's `error`.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    device = "cuda" if gpu else "cpu"
    if gpu:
        open_gpu(gpu)
    try:
        loaded = _load(prepared, split, recovery, dtype, device)
        size = batch_size or default_batch_size(split)
        if gpu and batch_size is None:
            image_bytes = measure_image(loaded.load_whole(), loaded.pixels)
            size = fit_batch(image_bytes, len(split), gpu, loaded.kept)
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"network and search split do not fit into {gpu:g} of the GPU's memory: set "
            "cluster.gpus_per_evaluator to a larger share"
        ) from error
    labels_of_split = from_shared(split.labels)
    is_halved, trimmed_at = False, time.monotonic()

    def score(candidate: Candidate) -> Measurement:
        nonlocal size, is_halved, trimmed_at
        if time.monotonic() - trimmed_at > TRIM_SECONDS:
            give_back_memory()
            trimmed_at = time.monotonic()
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
        network = loaded.network(candidate.order).load(candidate.keep_counts, size)
        scored = len(split.take(candidate.images or images))
        logits = _race(network, loaded.pixels, labels_of_split[:scored], candidate.best)
        labels = labels_of_split[: len(logits)]
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
        hits = find_hits(logits, labels).numpy()
        if len(logits) == len(split.take(images)):
            return dataclasses.replace(found, hits=encode_hits(hits))
        if len(logits) < scored:
            top1 = estimate(hits, decode_hits(candidate.best))
            return dataclasses.replace(found, top1=top1, status="stopped")
        return found

    return score


def measure_need(
    prepared: Prepared,
    split: ImageSet,
    *,
    recovery: str,
    batch_size: int | None = None,
    dtype: str,
    **_others: object,
) -> Need:
    """The memory of an evaluator, measured on a GPU of which this process has all.

    Args are those of `make_scorer`.

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
    batch = batch_size or liked_batch(math.prod(split.images.shape[1:3]), len(split))
    return find_need(image_bytes, batch, loaded.kept, repair_bytes)


@dataclasses.dataclass(frozen=True)
class _Loaded:
    """What scores, on its device.

    Attributes:
        cutters: By importance order.
        networks: Likewise, made when they are first asked for.
        precision: Of the networks.
        pixels: Of the split.
        kept: Bytes that scoring comes to hold later.
    """

    cutters: Cutters
    networks: dict[str, FastNetwork]
    precision: torch.dtype
    pixels: Pixels
    kept: int

    def network(self, order: str) -> FastNetwork:
        """Of an importance order."""
        if order not in self.networks:
            self.networks[order] = FastNetwork(self.cutters[order], self.precision)
        return self.networks[order]

    def load_whole(self) -> Callable[[Pixels, int, int], Tensor]:
        """The whole network, which takes most; for `cacp_ray.evaluation.gpu` to try."""
        whole = self.cutters[""].plan.cost_model.num_channels.tolist()
        return self.network("").load(whole, TRIED_IMAGES)


def _load(prepared: Prepared, split: ImageSet, recovery: str, dtype: str, device: str) -> _Loaded:
    # On a GPU all orders at once, so that what they take is known.
    orders = ("", *prepared.others) if device == "cuda" else ("",)
    kept = CACHE_BYTES * len(orders) if recovery == "compensate" else 0
    cutters, precision = Cutters(prepared, recovery, device), read_dtype(dtype, device)
    networks = {order: FastNetwork(cutters[order], precision) for order in orders}
    return _Loaded(cutters, networks, precision, put_pixels(split, device), kept)


def _race(
    network: Callable[[Pixels, int, int], Tensor], pixels: Pixels, labels: Tensor, encoded: str
) -> Tensor:
    """Logits on the images with labels, or on the first where the network fell behind the best."""
    if not encoded:
        return network(pixels, 0, len(labels))
    best = decode_hits(encoded)
    logits, done = [], 0
    for stop in prefixes(len(labels)):
        logits.append(network(pixels, done, stop))
        done = stop
        so_far = torch.cat(logits)
        hits = find_hits(so_far, labels[:done]).numpy()
        if has_fallen_behind(hits, best[:done]):
            return so_far
    return torch.cat([*logits, network(pixels, done, len(labels))])
