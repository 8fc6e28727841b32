"""Recovery: keep counts in, repaired tensors out, alike for scoring and for saved subnets."""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cacp_ray.pruning.compensation import Compensator, LayerFactors
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.surgery import Skeleton, Slicer

BN_STATISTICS = ("running_mean", "running_var")
Cut = Callable[[Sequence[int]], dict[str, Tensor]]


def make_cut(
    recovery: str,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    *,
    factors: Mapping[str, LayerFactors],
    skeleton: Skeleton,
    calibration: Tensor | None,
) -> Cut:
    """The function that turns keep counts into the tensors of the subnet.

    Args:
        recovery: `none` cuts only; `bn` re-estimates BN statistics on `calibration` (EagleEye,
            Li et al., 2020); `compensate` solves least squares (`cacp_ray.pruning.compensation`).
        plan: Of the network.
        tensors: State dict in importance order.
        factors: Only `compensate` reads them.
        skeleton: Only `bn` uses it.
        calibration: Normalised images (N, C, H, W); only `bn` reads them.
    """
    if recovery == "compensate":
        return Compensator(plan, tensors, factors)
    slicer = Slicer(plan)
    if recovery == "none":
        return lambda keep_counts: slicer(tensors, keep_counts)
    assert calibration is not None

    def cut_and_recalibrate(keep_counts: Sequence[int]) -> dict[str, Tensor]:
        # Statistics are written in place, so they must not be views of the shared tensors.
        small = {
            name: tensor.clone() if name.endswith(BN_STATISTICS) else tensor
            for name, tensor in slicer(tensors, keep_counts).items()
        }
        model = skeleton.load(small)
        recalibrate_bn(model, calibration)
        # Those of layers that stay whole have changed too.
        buffers = dict(model.named_buffers())
        return small | {n: b.clone() for n, b in buffers.items() if n.endswith(BN_STATISTICS)}

    return cut_and_recalibrate


def recalibrate_bn(model: nn.Module, images: Tensor, batch_size: int = 250) -> None:
    """Re-estimates running means and variances as averages over `images` (N, C, H, W).

    Batches of up to `batch_size` are of nearly equal size, so that none is a single image where
    there are more, and count by their images. BN layers without running statistics are left alone.
    """
    norms = [
        m
        for m in model.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.train()
    with torch.no_grad():
        seen = 0
        for batch in images.tensor_split(math.ceil(len(images) / batch_size)):
            seen += len(batch)
            for norm in norms:
                norm.momentum = len(batch) / seen
            model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
