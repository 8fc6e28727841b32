"""From keep counts to logits, as fast as a device allows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared, normalize
from cacp_ray.evaluation.fusion import FusedNetwork, fuse
from cacp_ray.evaluation.preparation import CutNetwork
from cacp_ray.pruning.surgery import Cutter

CHECKED_IMAGES = 4
BATCH_PIXELS = 2**19  # on a CPU, larger batches are no faster and take most of the memory
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}  # CUDA convolves in TF32


@dataclass(frozen=True)
class Pixels:
    """A split's images on a device; they are normalised there, batch by batch."""

    values: Tensor  # uint8 (N, H, W, C)
    mean: tuple[float, ...]  # of each colour, as in `ImageSet`
    std: tuple[float, ...]  # of each colour, as in `ImageSet`

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, start: int, stop: int) -> Tensor:
        """Images [start, stop), float32 (N, C, H, W), channels_last."""
        return normalize(self.values[start:stop], self.mean, self.std)


# (images, start, stop) -> logits float32 (stop - start, classes), in the CPU's memory
Predict = Callable[[Pixels, int, int], Tensor]


def put_pixels(split: ImageSet, device: str = "cpu") -> Pixels:
    """A split's images on a device; on the CPU they stay where they are."""
    values = from_shared(np.ascontiguousarray(split.images))
    return Pixels(values.to(device), split.mean, split.std)


class FastNetwork:
    """A network at any keep counts, fused where that gives the same logits."""

    def __init__(self, cut_network: CutNetwork, dtype: torch.dtype) -> None:
        self._cut_network, self._dtype = cut_network, dtype
        fused = fuse(cut_network.resizable.model)
        self._fused = fused if fused is not None and _agrees(fused, cut_network, dtype) else None

    def load(self, keep_counts: Sequence[int], batch_size: int) -> Predict:
        """The network at `keep_counts`; valid until the next call."""
        tensors = self._cut_network.cut(keep_counts)
        device = self._cut_network.device
        if self._fused is None:
            model, dtype = self._cut_network.resizable.load(tensors), torch.float32
            autocast = torch.autocast(device, dtype=self._dtype, enabled=self._dtype != dtype)
        else:
            model, dtype = self._fused.load({**self._cut_network.tensors, **tensors}), self._dtype
            autocast = torch.autocast(device, enabled=False)

        def predict(pixels: Pixels, start: int, stop: int) -> Tensor:
            bounds = [*range(start, stop, batch_size), stop]
            with torch.inference_mode(), autocast:
                parts = [
                    model(pixels.batch(first, last).to(dtype)).float()
                    for first, last in pairwise(bounds)
                ]
                return torch.cat(parts).cpu()

        return predict


def default_batch_size(split: ImageSet) -> int:
    """Images a forward pass on a CPU."""
    return max(1, BATCH_PIXELS // math.prod(split.images.shape[1:3]))


def _agrees(fused: FusedNetwork, cut_network: CutNetwork, dtype: torch.dtype) -> bool:
    """Whether whole and cut networks give the same logits when fused; sets the fused dtype."""
    assert isinstance(cut_network.calibration, ImageSet)  # the only ones that are scored here
    images = cut_network.calibration.take(CHECKED_IMAGES).tensors()[0].to(cut_network.device)
    whole = cut_network.plan.cost_model.num_channels
    cutter = Cutter(cut_network.plan)
    for counts in (whole, np.maximum(cut_network.plan.least_counts, whole // 2)):
        tensors = {**cut_network.tensors, **cutter(cut_network.tensors, counts.tolist())}
        try:
            with torch.inference_mode():
                expected = cut_network.resizable.load(tensors)(images)
                logits = fused.load(tensors)(images)
                fused.dtype = dtype
                fused.load(tensors)(images.to(dtype))
        except Exception:  # the traced graph may hold sizes or dtypes as constants
            return False
        bound = TOLERANCE[cut_network.device]
        tolerance = bound * float(expected.nan_to_num().abs().max())
        if not torch.allclose(logits, expected, rtol=bound, atol=tolerance, equal_nan=True):
            return False
        fused.dtype = torch.float32
    fused.dtype = dtype
    return True
