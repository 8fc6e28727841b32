"""Networks that Torch-Pruning cuts, for bench/finetune.py.

Group importance by the norm of weights, or by the first-order Taylor term on training images, with
one threshold for all groups (global pruning): Fang et al., DepGraph, CVPR 2023, in the authors'
package. Every group may be cut, as in our searches. The largest network within the budget is
taken; both sides count MACs by this package.
"""

import copy
import warnings
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.pruning.verify import count_macs

IMPORTANCES = ("norm", "taylor")
TAYLOR_BATCHES = 20
BATCH = 128
HALVINGS = 20  # of the interval in which the pruning ratio lies


def prune(model: nn.Module, images: Tensor, labels: Tensor, rate: float, by: str) -> nn.Module:
    """The network cut to at most `rate` of its MACs.

    Args:
        model: Whole network, in evaluation mode; it stays as it is.
        images: (N, 3, H, W) normalised training images, read for `taylor` only.
        labels: (N,) their classes.
        rate: Share of the MACs that is kept.
        by: One of IMPORTANCES.
    """
    warnings.filterwarnings("ignore", module="torch_pruning")
    x = images[:1]
    gradients = _take_gradients(model, images, labels) if by == "taylor" else {}
    limit = rate * count_macs(model, x)
    low, high = 0.0, 1.0  # share of channels removed: too little, too much
    best: nn.Module | None = None
    for _ in range(HALVINGS):
        ratio = (low + high) / 2
        small = _prune_by_ratio(model, x, gradients, ratio)
        if count_macs(small, x) <= limit:
            best, high = small, ratio
        else:
            low = ratio
    assert best is not None
    return best


def _take_gradients(model: nn.Module, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Gradients of the loss by parameter."""
    copied = copy.deepcopy(model)
    for number in range(TAYLOR_BATCHES):
        rows = slice(number * BATCH, (number + 1) * BATCH)
        functional.cross_entropy(copied(images[rows]), labels[rows]).backward()
    return {name: p.grad for name, p in copied.named_parameters() if p.grad is not None}


def _prune_by_ratio(
    model: nn.Module, x: Tensor, gradients: dict[str, Tensor], ratio: float
) -> nn.Module:
    import torch_pruning as tp

    small = copy.deepcopy(model)
    importance: Any = tp.importance.GroupMagnitudeImportance(p=2)
    if gradients:
        importance = tp.importance.GroupTaylorImportance()
        for name, parameter in small.named_parameters():
            parameter.grad = gradients[name].clone()
    pruner = tp.pruner.BasePruner(
        small,
        x,
        importance=importance,
        global_pruning=True,
        pruning_ratio=ratio,
        ignored_layers=[m for m in small.modules() if isinstance(m, nn.Linear)],
    )
    pruner.step()
    small.zero_grad(set_to_none=True)
    return small.eval()
