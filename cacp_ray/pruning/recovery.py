"""Recovery: keep counts in, cut and repaired tensors out; scoring and saving share it."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from cacp_ray.pruning.compensation import Compensator, LayerFactors
from cacp_ray.pruning.inputs import Inputs, call, tensors_of
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.surgery import Cutter
from cacp_ray.pruning.torch_types import BatchNorm

BN_STATISTICS = ("running_mean", "running_var")
Recovery = Callable[[Sequence[int]], dict[str, Tensor]]


def make_recovery(
    recovery: str,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    *,
    factors: Mapping[str, LayerFactors],
    resizable: ResizableNetwork,
    calibration: Sequence[Inputs],
) -> Recovery:
    """The function that turns keep counts into the tensors of the subnet.

    `none` cuts `tensors`, which are in importance order. `bn` runs `resizable` to re-estimate BN
    statistics on `calibration`, batches of training inputs (EagleEye, Li et al., 2020).
    `compensate` solves least squares with `factors` (`cacp_ray.pruning.compensation`).
    """
    if recovery == "compensate":
        return Compensator(plan, tensors, factors)
    cutter = Cutter(plan)
    if recovery == "none":
        return lambda keep_counts: cutter(tensors, keep_counts)
    assert calibration

    def cut_and_recalibrate(keep_counts: Sequence[int]) -> dict[str, Tensor]:
        # Statistics are written in place, so they must not be views of the shared tensors.
        small = {
            name: tensor.clone() if name.endswith(BN_STATISTICS) else tensor
            for name, tensor in cutter(tensors, keep_counts).items()
        }
        model = resizable.load(small)
        recalibrate_bn(model, calibration)
        # BN statistics of layers that stay whole have changed too.
        buffers = dict(model.named_buffers())
        return small | {n: b.clone() for n, b in buffers.items() if n.endswith(BN_STATISTICS)}

    return cut_and_recalibrate


def recalibrate_bn(model: nn.Module, batches: Sequence[Inputs]) -> None:
    """Re-estimates running means and variances as averages over batches of inputs.

    Each batch weighs as many examples as it holds. BN layers without running statistics are left
    alone.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNorm) and m.running_mean is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        norm.running_mean.zero_()
        norm.running_var.fill_(1)
        norm.train()
    with torch.no_grad():
        seen = 0
        for batch in batches:
            size = len(tensors_of(batch)[0])
            seen += size
            for norm in norms:
                norm.momentum = size / seen
            call(model, batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
