"""Scoring on a share of a GPU: memory that is the evaluator's own, and batches that fill it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.network import Pixels

T = TypeVar("T")

TRIED_IMAGES = 16
MAX_BATCH = 4096
FILL = 0.7  # of the memory left, by a batch of the whole network
CONTEXT_BYTES = 2**29  # of CUDA itself in every process; no torch setting limits it
LIKED_PIXELS = 2**22  # of a batch: 4,096 images of CIFAR, 83 of ImageNet; larger ones gain little
# Processes take turns on a GPU: more of them only hide where one prepares weights. Not measured.
MAX_EVALUATORS = 8


@dataclass(frozen=True)
class Need:
    """Memory of one evaluator on a GPU, and of the GPU as far as no others have it, in bytes."""

    evaluator: float
    gpu: float

    @property
    def num_evaluators(self) -> int:
        """That a GPU holds; one where none fits, which then says what it lacks."""
        return min(max(1, int(self.gpu / self.evaluator)), MAX_EVALUATORS)


def open_gpu(share: float) -> None:
    """Keeps this process to its share of the GPU's memory.

    Args:
        share: In (0, 1].

    Raises:
        EvaluationError: torch cannot use a GPU here.
    """
    if not torch.cuda.is_available():
        raise EvaluationError(
            "Ray gave a GPU, but torch cannot use one: install a CUDA build of torch on that node, "
            "or set cluster.gpus_per_evaluator to 0"
        )
    torch.cuda.set_per_process_memory_fraction(own_memory(share) / _total_memory())


def own_memory(share: float) -> float:
    """Bytes of the share that tensors may take; the rest is CUDA's own for the process."""
    return max(share * _total_memory() - CONTEXT_BYTES, share * _total_memory() / 2)


def measure_image(predict: Callable[[Pixels, int, int], Tensor], pixels: Pixels) -> float:
    """Bytes that an image of a batch takes while it is scored.

    Args:
        predict: Of the whole network, with batches of `TRIED_IMAGES`.
        pixels: Of the split.
    """
    tried = min(TRIED_IMAGES, len(pixels))
    _, taken = measure_peak(lambda: predict(pixels, 0, tried))
    return max(1, taken / tried)


def measure_peak(run: Callable[[], T]) -> tuple[T, int]:
    """What it returns, and the bytes that it took meanwhile."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run()
    return found, torch.cuda.max_memory_allocated() - before


def fit_batch(image_bytes: float, num_images: int, share: float, kept: int) -> int:
    """Images a forward pass that a share of the GPU holds, beside what this process has there.

    Args:
        image_bytes: See `measure_image`.
        num_images: Of the split.
        share: Of the GPU's memory.
        kept: Bytes that scoring comes to hold later.
    """
    left = own_memory(share) - torch.cuda.memory_allocated() - kept
    return int(min(max(left * FILL / image_bytes, 1), MAX_BATCH, num_images))


def find_need(image_bytes: float, batch: int, kept: int, repair_bytes: int) -> Need:
    """What an evaluator needs to score in such batches, from what this process holds there.

    Args:
        image_bytes: See `measure_image`.
        batch: Images a forward pass.
        kept: As of `fit_batch`.
        repair_bytes: That cutting and repairing a network takes meanwhile, before any is scored.
    """
    own = CONTEXT_BYTES + torch.cuda.memory_allocated() + kept
    free, total = torch.cuda.mem_get_info()
    # What others hold on this GPU, outside Ray, is no evaluator's.
    there = min(total, free + torch.cuda.memory_reserved() + CONTEXT_BYTES)
    return Need(own + max(repair_bytes, image_bytes * batch / FILL), there)


def liked_batch(image_pixels: int, num_images: int) -> int:
    """Images a forward pass that keep a GPU busy."""
    return min(max(1, LIKED_PIXELS // image_pixels), MAX_BATCH, num_images)


def _total_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory
