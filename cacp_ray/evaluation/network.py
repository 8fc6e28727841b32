"""Keep counts -> logits, as fast as a device allows."""

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
from cacp_ray.evaluation.preparation import Cutter
from cacp_ray.pruning.surgery import Slicer

CHECKED_IMAGES = 4
BATCH_PIXELS = 2**19  # on a CPU larger batches are no faster, and take most of the memory
TOLERANCE = {"cpu": 1e-3, "cuda": 1e-2}  # convolutions in TF32


@dataclass(frozen=True)
class Pixels:
    """A split on the device that scores it; normalised there, batch by batch.

    Attributes:
        values: uint8 (N, H, W, 3).
        mean: As of `ImageSet`.
        std: As of `ImageSet`.
    """

    values: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.values)

    def batch(self, start: int, stop: int) -> Tensor:
        """Images [start, stop), float32 (N, C, H, W), channels_last."""
        return normalize(self.values[start:stop], self.mean, self.std)


def put_pixels(split: ImageSet, device: str = "cpu") -> Pixels:
    """A split's images on a device; on the CPU they stay where they are."""
    values = from_shared(np.ascontiguousarray(split.images))
    return Pixels(values.to(device), split.mean, split.std)


class FastNetwork:
    """A network at any keep counts: fused where that gives the same logits."""

    def __init__(self, cutter: Cutter, dtype: torch.dtype) -> None:
        self._cutter, self._dtype = cutter, dtype
        fused = fuse(cutter.skeleton.model)
        self._fused = fused if fused is not None and _agrees(fused, cutter, dtype) else None

    def load(
        self, keep_counts: Sequence[int], batch_size: int
    ) -> Callable[[Pixels, int, int], Tensor]:
        """(Images, start, stop) -> logits float32 (stop - start, classes), in the CPU's memory.

        Valid until the next call.
        """
        tensors = self._cutter.cut(keep_counts)
        device = self._cutter.device
        if self._fused is None:
            model, dtype = self._cutter.skeleton.load(tensors), torch.float32
            autocast = torch.autocast(device, dtype=self._dtype, enabled=self._dtype != dtype)
        else:
            model, dtype = self._fused.load({**self._cutter.tensors, **tensors}), self._dtype
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
    """As many images as hold `BATCH_PIXELS`."""
    return max(1, BATCH_PIXELS // math.prod(split.images.shape[1:3]))


def _agrees(fused: FusedNetwork, cutter: Cutter, dtype: torch.dtype) -> bool:
    """Whether whole and cut networks compute the same when fused; sets its dtype."""
    images = cutter.calibration.take(CHECKED_IMAGES).tensors()[0].to(cutter.device)
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
        bound = TOLERANCE[cutter.device]
        tolerance = bound * float(expected.nan_to_num().abs().max())
        if not torch.allclose(found, expected, rtol=bound, atol=tolerance, equal_nan=True):
            return False
        fused.dtype = torch.float32
    fused.dtype = dtype
    return True
