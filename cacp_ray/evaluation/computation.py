"""A fingerprint of what a network computes: its operations, not its code.

Two networks of the same modules and weights may differ in their `forward`.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cacp_ray.pruning.inputs import Inputs, call, tensors_of


def hash_computation(model: nn.Module, inputs: Inputs) -> str:
    """sha256 of the operations of a forward pass in evaluation mode, in their order.

    The hash covers the arguments of each operation: shapes, numbers, and the values of tensors that
    are constants of the code (neither weights, nor inputs, nor results). Inputs of one example,
    such as a normalised image (1, C, H, W), are enough.
    """
    was_training = model.training
    model.eval()
    weights = {t.data_ptr() for t in (*model.parameters(), *model.buffers(), *tensors_of(inputs))}
    recorder = _Recorder(weights)
    with torch.no_grad(), recorder:
        call(model, inputs)
    model.train(was_training)
    return recorder.digest.hexdigest()


class _Recorder(TorchDispatchMode):
    def __init__(self, weights: set[int]) -> None:
        super().__init__()  # pyright: ignore[reportUnknownMemberType]
        self.digest = hashlib.sha256()
        self._weights = weights
        self._results: dict[int, Tensor] = {}  # by id; held, as Python reuses free ids

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.digest.update(f"{func}\n".encode())
        for value in tree_leaves((args, kwargs or {})):
            if not isinstance(value, Tensor):
                self.digest.update(f"{value}\n".encode())
                continue
            self.digest.update(f"{value.dtype} {tuple(value.shape)}\n".encode())
            if id(value) not in self._results and value.data_ptr() not in self._weights:
                self.digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
        result = func(*args, **(kwargs or {}))
        self._results |= {id(t): t for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result
