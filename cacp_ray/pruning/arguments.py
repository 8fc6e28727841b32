"""What a network is called with, as subnet.json describes it, and examples made from that.

A search writes the description of its example inputs; an export makes examples of any batch size
from it.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cacp_ray.pruning.inputs import Inputs, tensors_of

Dtype = Literal[
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64"
]  # types that NumPy knows too, and so every reader of a file
DTYPES: tuple[str, ...] = get_args(Dtype)


@dataclass(frozen=True)
class Argument:
    """A tensor that a network is called with.

    Attributes:
        name: Name of the argument; None where it is given by position.
        shape: Shape without the batch; the whole shape where there is no batch.
        dtype: One of DTYPES. It and the shape are None where the argument is no such tensor.
        is_batch: Whether the first dimension, left out of `shape`, is the batch.
    """

    name: str | None
    shape: tuple[int, ...] | None
    dtype: str | None = "float32"
    is_batch: bool = True

    def __str__(self) -> str:
        """Such as `tokens int64 (12,)`."""
        parts = (self.name, self.dtype or "no tensor", self.shape)
        return " ".join(str(part) for part in parts if part is not None)

    @property
    def is_plain(self) -> bool:
        """Whether its shape says all."""
        return self.shape is not None and self == Argument(None, self.shape)


def describe_inputs(inputs: Inputs) -> dict[str, Any]:
    """Entry `inputs` of subnet.json; empty for one float32 tensor, of which `input_shape` says all.

    Args:
        inputs: Inputs of one example, as `check_inputs` returns them.
    """
    if isinstance(inputs, Mapping):
        named = list(inputs.items())
    else:
        given = [inputs] if isinstance(inputs, Tensor) else inputs
        named = [(None, value) for value in given]
    is_batch = len({tensor.shape[0] for tensor in tensors_of(inputs)}) == 1
    arguments = [_describe(name, value, is_batch) for name, value in named]
    if len(arguments) == 1 and arguments[0].is_plain:
        return {}
    return {"inputs": [asdict(each) for each in arguments]}


def _describe(name: str | None, value: Any, is_batch: bool) -> Argument:
    dtype = str(value.dtype).removeprefix("torch.") if isinstance(value, Tensor) else ""
    if dtype not in DTYPES:
        return Argument(name, None, None, is_batch)
    return Argument(name, tuple(value.shape[is_batch:]), dtype, is_batch)


def read_arguments(description: Mapping[str, Any]) -> tuple[Argument, ...]:
    """Arguments of the network that a checked subnet.json describes."""
    if not description.get("inputs"):
        return (Argument(None, tuple(description["input_shape"])),)
    return tuple(
        Argument(
            entry.get("name"),
            None if entry.get("shape") is None else tuple(entry["shape"]),
            entry.get("dtype"),
            entry.get("is_batch", True),
        )
        for entry in description["inputs"]
    )


def make_inputs(arguments: tuple[Argument, ...], batch: int, generator: torch.Generator) -> Inputs:
    """Examples: normal random numbers, and zeros for integers, which every embedding has.

    Args:
        arguments: Tensors with a shape; all of them have a name, or none.
        batch: Number of examples, for arguments that have a batch.
        generator: Source of the random numbers.

    Returns:
        One tensor where that is all, a dictionary where arguments have names, else a tuple.
    """
    tensors = [_make(argument, batch, generator) for argument in arguments]
    if len(arguments) == 1 and arguments[0].is_plain:
        return tensors[0]
    named = {a.name: t for a, t in zip(arguments, tensors, strict=True) if a.name is not None}
    return named or tuple(tensors)


def _make(argument: Argument, batch: int, generator: torch.Generator) -> Tensor:
    assert argument.shape is not None, "callers refuse what is no tensor"
    assert argument.dtype is not None
    shape = (batch, *argument.shape) if argument.is_batch else argument.shape
    dtype: torch.dtype = getattr(torch, argument.dtype)
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    return torch.randn(shape, generator=generator).to(dtype)
