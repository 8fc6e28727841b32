"""Input statistics of every layer that mixes prunable channels, from one pass over images.

For a convolution the input is the unfolded patch (C_in * k * k values at each output position), for
a linear layer its input vector. Patches are taken at sampled positions: neighbours tell the same
thing.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.pruning.plan import Plan

RIDGE = 1e-4  # noise on each input, as a share of the mean variance


@dataclass(frozen=True)
class InputMoments:
    """Of a layer's unfolded input, D = C_in * k * k values, channel by channel; float64.

    Attributes:
        mean: (D,).
        covariance: (D, D); of a separable form (C_in, C_in), between channels.
        taps: None, or (k * k, k * k): then the covariance is that between channels times that
            between taps, cov[(c, t), (c', t')] = covariance[c, c'] * taps[t, t'].
    """

    mean: NDArray[np.float64]
    covariance: NDArray[np.float64]
    taps: NDArray[np.float64] | None = None


@dataclass(frozen=True)
class GateGradients:
    """Of one group: derivatives of the loss by a gate on each channel, over images n.

    The gate of a channel multiplies it at the input of every layer that mixes it, so that closing
    the gate is cutting the channel: dL_n/dm = sum over layers and places of A * dL_n/dA.

    Attributes:
        absolute: (C,) mean of |dL_n/dm|.
        square: (C,) mean of (dL_n/dm)^2.
    """

    absolute: NDArray[np.float64]
    square: NDArray[np.float64]


@dataclass(frozen=True)
class Statistics:
    """What calibration images tell of a network.

    Attributes:
        inputs: By the weight name of a consumer; empty where not collected.
        gates: One a group; empty where not collected.
    """

    inputs: dict[str, InputMoments] = field(default_factory=dict)
    gates: tuple[GateGradients, ...] = ()


def collect_statistics(
    model: nn.Module,
    plan: Plan,
    images: Tensor,
    *,
    seed: int,
    positions: int = 64,
    batch_size: int = 125,
) -> Statistics:
    """One pass of the whole network.

    Args:
        model: The base network.
        plan: Of `model`.
        images: Normalised calibration images (N, C, H, W), from training rows only.
        seed: Of the sampled positions.
        positions: Patches taken of each image, at most.
        batch_size: Images a forward pass.
    """
    sums: dict[str, tuple[Tensor, Tensor, int]] = {}
    shifts: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    modules = dict(model.named_modules())
    hooks = []
    for consumer in plan.consumers:

        def record(module: nn.Module, args: tuple[Tensor], name: str = consumer.weight) -> None:
            rows = sample_patches(module, args[0], positions, generator)  # (R, D)
            # Products in float32 about a first guess of the mean, sums in float64: fast, and the
            # covariance stays positive.
            rows = rows - shifts.setdefault(name, rows.mean(0))
            total, square, count = sums.get(name, (0.0, 0.0, 0))
            sums[name] = (
                total + rows.sum(0).double(),
                square + (rows.T @ rows).double(),
                count + len(rows),
            )

        hooks.append(modules[consumer.module].register_forward_pre_hook(record))
    try:
        model.eval()
        with torch.inference_mode():
            for batch in images.split(batch_size):
                model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    moments = {}
    for name, (total, square, count) in sums.items():
        mean = total / count  # of the shifted rows
        moments[name] = InputMoments(
            (mean + shifts[name]).numpy(), (square / count - torch.outer(mean, mean)).numpy()
        )
    return Statistics(moments)


def regularized(covariance: Tensor) -> Tensor:
    """A covariance (D, D) plus a ridge, so that it can be factored."""
    noise = RIDGE * covariance.diagonal().mean() + 1e-12
    return covariance + noise * torch.eye(len(covariance), dtype=covariance.dtype)


def sample_patches(
    module: nn.Module, x: Tensor, positions: int, generator: torch.Generator
) -> Tensor:
    """Rows (R, D) of a layer's unfolded input at up to `positions` places of every image."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = module.kernel_size, module.stride, module.dilation
    height = (x.shape[2] - dh * (kh - 1) - 1) // sh + 1
    width = (x.shape[3] - dw * (kw - 1) - 1) // sw + 1
    place = torch.randperm(height * width, generator=generator)[:positions]
    rows = (place // width * sh)[:, None, None] + dh * torch.arange(kh)[:, None]  # (P, kh, 1)
    columns = (place % width * sw)[:, None, None] + dw * torch.arange(kw)  # (P, 1, kw)
    patches = x[:, :, rows, columns]  # (N, C, P, kh, kw)
    return patches.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()
