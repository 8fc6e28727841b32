"""Scoring on a share of a GPU: memory that is the evaluator's own, and batches that fill it."""

from collections.abc import Callable

import torch
from torch import Tensor

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.network import Pixels

TRIED_IMAGES = 16
MAX_BATCH = 4096
FILL = 0.7  # of the memory left, by a batch of the whole network
CONTEXT_BYTES = 2**29  # of CUDA itself in every process; no torch setting limits it


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


def fit_batch(
    predict: Callable[[Pixels, int, int], Tensor], pixels: Pixels, share: float, kept: int
) -> int:
    """Images a forward pass, from what a few images of the whole network take.

    Args:
        predict: Of the whole network, with batches of `TRIED_IMAGES`.
        pixels: Of the split.
        share: Of the GPU's memory.
        kept: Bytes that scoring comes to hold later.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    tried = min(TRIED_IMAGES, len(pixels))
    predict(pixels, 0, tried)
    each = max(1, (torch.cuda.max_memory_allocated() - before) / tried)
    left = own_memory(share) - before - kept
    return int(min(max(left * FILL / each, 1), MAX_BATCH, len(pixels)))


def _total_memory() -> int:
    return torch.cuda.get_device_properties(0).total_memory
