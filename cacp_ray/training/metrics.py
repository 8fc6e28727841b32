"""Accuracy and loss of a network on labelled images."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.io.environment import give_back_memory

Split = ImageSet | ImageStream  # labelled images in order
MOST_PIXELS = 50 * 224**2  # in a batch: ResNet-50's largest feature map then takes 160 MB


@dataclass(frozen=True)
class Accuracy:
    """Shares of images in [0, 1], and the mean cross-entropy in nats."""

    top1: float
    top5: float
    loss: float
    images: int

    @property
    def standard_error(self) -> float:
        """Binomial standard error of top1."""
        return (self.top1 * (1 - self.top1) / self.images) ** 0.5


def fast_dtype(device: str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively, else float32."""
    if device == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float32
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def find_device(model: nn.Module) -> torch.device:
    """Device of a model's weights; the CPU where it has none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def predict(model: nn.Module, images: Tensor, batch_size: int, dtype: torch.dtype) -> Tensor:
    """Logits float32 (N, classes) in evaluation mode, computed on the model's device in `dtype`.

    With float32, a GPU computes without TF32.
    """
    was_training = model.training
    model.eval()
    device = find_device(model)
    autocast = torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)
    exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=dtype != torch.float32)
    with torch.inference_mode(), autocast, exact:
        logits = [model(batch.to(device)).float().cpu() for batch in images.split(batch_size)]
    model.train(was_training)
    return torch.cat(logits)


def find_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly, bool (N,), from logits (N, C) and labels (N,)."""
    return logits.argmax(1) == labels


def score_logits(logits: Tensor, labels: Tensor) -> Accuracy:
    """Accuracy of logits (N, classes) against labels (N,)."""
    is_right = find_hits(logits, labels)
    # Where logits are equal, as in bfloat16, `topk` may choose others than `argmax` does.
    is_near = (logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]).any(1)
    return Accuracy(
        top1=is_right.float().mean().item(),
        top5=(is_near | is_right).float().mean().item(),
        loss=functional.cross_entropy(logits, labels).item(),
        images=len(labels),
    )


def measure_split(
    model: nn.Module, split: Split, *, batch_size: int = 500, dtype: torch.dtype = torch.float32
) -> Accuracy:
    """Accuracy of `model` on a split; only one batch at a time is held in float32.

    Batches of large images are smaller, because their feature maps are larger still.
    """
    logits, labels = [], []
    for part in split.parts(batch_size):
        height, width = part.images.shape[1:3]
        at_once = min(batch_size, max(1, MOST_PIXELS // (height * width)))
        for batch in part.parts(at_once):
            images, own = batch.tensors()
            logits.append(predict(model, images, at_once, dtype))
            labels.append(own)
            if at_once < batch_size:  # large images leave much memory behind
                give_back_memory()
    return score_logits(torch.cat(logits), torch.cat(labels))


def measure(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    batch_size: int = 500,
    dtype: torch.dtype = torch.float32,
) -> Accuracy:
    """Accuracy of `model` on normalised images (N, C, H, W)."""
    return score_logits(predict(model, images, batch_size, dtype), labels)
