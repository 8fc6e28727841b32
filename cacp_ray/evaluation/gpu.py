"""Scoring on a share of a GPU: a memory limit for each evaluator, and batches that fill it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.network import Pixels, Predict

T = TypeVar("T")

TRIED_IMAGES = 16
MAX_BATCH = 4096
FILL = 0.7  # share of the free memory that a batch of the whole network takes
CONTEXT_BYTES = 2**29  # CUDA's own memory in every process; no torch setting limits it
BATCH_PIXELS = 2**22  # 4,096 images of CIFAR, 83 of ImageNet; larger batches gain little
# Processes take turns on a GPU: more of them only hide where one prepares weights. Not measured.
MAX_EVALUATORS = 8


@dataclass(frozen=True)
class Need:
    """Bytes of GPU memory."""

    evaluator: float  # memory of one evaluator
    gpu: float  # memory of the GPU that no other program holds

    @property
    def num_evaluators(self) -> int:
        """Evaluators that fit on the GPU; 1 where none fits, so that it reports what it lacks."""
        return min(max(1, int(self.gpu / self.evaluator)), MAX_EVALUATORS)


def open_gpu(share: float) -> None:
    """Limits this process to a share of the GPU's memory, in (0, 1].

    Raises:
        EvaluationError: torch cannot use a GPU here.
    """
    if not torch.cuda.is_available():
        raise EvaluationError(
            "Ray gave a GPU, but torch cannot use one: install a CUDA build of torch on that node, "
            "or set cluster.gpus_per_evaluator to 0"
        )
    share_of_tensors = own_memory(share) / _total_memory()
    torch.cuda.set_per_process_memory_fraction(share_of_tensors)  # pyright: ignore[reportUnknownMemberType]


def own_memory(share: float) -> float:
    """Bytes of the share that tensors may take; CUDA itself takes the rest."""
    return max(share * _total_memory() - CONTEXT_BYTES, share * _total_memory() / 2)


def measure_image(predict: Predict, pixels: Pixels) -> float:
    """Bytes that each image takes while the whole network scores a batch of `TRIED_IMAGES`."""
    tried = min(TRIED_IMAGES, len(pixels))
    _, taken = measure_peak(lambda: predict(pixels, 0, tried))
    return max(1, taken / tried)


def measure_peak(run: Callable[[], T]) -> tuple[T, int]:
    """What `run` returns, and the most bytes that it took."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = run()
    return result, torch.cuda.max_memory_allocated() - before


def fit_batch(image_bytes: float, num_images: int, share: float, kept: int) -> int:
    """Images a forward pass that fit into a share of the GPU, with what this process holds there.

    `kept` bytes are left free, which later scoring will hold.
    """
    left = own_memory(share) - torch.cuda.memory_allocated() - kept
    return int(min(max(left * FILL / image_bytes, 1), MAX_BATCH, num_images))


def find_need(image_bytes: float, batch: int, kept: int, repair_bytes: int) -> Need:
    """Memory that an evaluator needs, from what this process holds on the GPU.

    Later scoring will hold `kept` bytes in addition; `repair_bytes` is the peak of cutting and
    repairing a network, before a batch of images is scored.
    """
    own = CONTEXT_BYTES + torch.cuda.memory_allocated() + kept
    free, total = torch.cuda.mem_get_info()
    # Programs outside Ray may hold memory of this GPU.
    available = min(total, free + torch.cuda.memory_reserved() + CONTEXT_BYTES)
    return Need(own + max(repair_bytes, image_bytes * batch / FILL), available)


def gpu_batch_size(image_pixels: int, num_images: int) -> int:
    """Images a forward pass that keep a GPU busy."""
    return min(max(1, BATCH_PIXELS // image_pixels), MAX_BATCH, num_images)


def _total_memory() -> int:
    return int(torch.cuda.get_device_properties(0).total_memory)  # pyright: ignore
