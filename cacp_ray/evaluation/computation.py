"""What a network computes, written down: its operations, not its code.

Two networks of the same modules and weights may differ in their `forward`.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def hash_computation(model: nn.Module, images: Tensor) -> str:
    """sha256 of the operations of a forward pass in evaluation mode, in their order.

    Covers what they are called with: shapes, numbers, and the values of tensors that are neither
    weights, nor the input, nor results (constants of the code).

    Args:
        model: Any network.
        images: Its input (N, C, H, W), normalised; one is enough.
    """
    was_training = model.training
    model.eval()
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), images)}
    recorder = _Recorder(weights)
    with torch.no_grad(), recorder:
        model(images)
    model.train(was_training)
    return recorder.digest.hexdigest()


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: set[int]) -> None:
        super().__init__()
        self.digest = hashlib.sha256()
        self._weights = weights
        self._results: dict[int, Tensor] = {}  # by id; held, so that no id is given twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.digest.update(f"{func}\n".encode())
        for each in tree_leaves((args, kwargs or {})):
            if not isinstance(each, Tensor):
                self.digest.update(f"{each}\n".encode())
                continue
            self.digest.update(f"{each.dtype} {tuple(each.shape)}\n".encode())
            if id(each) not in self._results and each.data_ptr() not in self._weights:
                self.digest.update(each.contiguous().flatten().view(torch.uint8).numpy().data)
        found = func(*args, **(kwargs or {}))
        self._results |= {id(t): t for t in tree_leaves(found) if isinstance(t, Tensor)}
        return found
