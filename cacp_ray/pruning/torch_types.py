"""What this package uses of torch although torch keeps it private or without types."""

# pyright: basic
# Basic: `torch.linalg` and the functions below have no types; torch has no public names for the
# base classes of its convolutions and norms.

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

BatchNorm = nn.modules.batchnorm._BatchNorm
Convolution = nn.modules.conv._ConvNd  # of any dimension, transposed or not
RunningNorm = nn.modules.batchnorm._NormBase  # batch norms and instance norms


def own_random_state() -> AbstractContextManager[None]:
    """Gives the random state of the CPU back afterwards."""
    return torch.random.fork_rng(devices=[])


def backpropagate(loss: Tensor) -> None:
    """Adds the gradients of a loss to the parameters it was computed from."""
    loss.backward()


def named_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its path."""
    return model.named_modules()


def padding_of(module: nn.Conv2d) -> list[int]:
    """Padding of both sides of both dimensions, as `torch.nn.functional.pad` takes it."""
    return module._reversed_padding_repeated_twice


def broadcast(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors expanded to one shape."""
    first, second = torch.broadcast_tensors(first, second)
    return first, second


def cholesky(matrix: Tensor) -> Tensor:
    """Lower factor (..., D, D); raises an error unless the matrices are positive definite."""
    return torch.linalg.cholesky(matrix)


def try_cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower factor (..., D, D), and (...) zeros where the matrix is positive definite."""
    return torch.linalg.cholesky_ex(matrix)


def solve_triangular(factor: Tensor, right: Tensor, *, upper: bool) -> Tensor:
    """The solution of factor @ X = right, for a triangular factor."""
    return torch.linalg.solve_triangular(factor, right, upper=upper)


def tensordot(first: Tensor, second: Tensor) -> Tensor:
    """The sum over the last dimension of `first` and the first of `second`."""
    return torch.tensordot(first, second, 1)


def row_norms(rows: Tensor) -> Tensor:
    """(R,) Euclidean norms of rows (R, D)."""
    return rows.norm(dim=1)


def as_channels_last(model: nn.Module) -> nn.Module:
    """The same network with its 2-d weights in the memory format that convolutions prefer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    return model


def split(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    """Views of consecutive parts along the first dimension."""
    return [*tensor.split(sizes)]


def leading_directions(matrix: Tensor) -> Tensor:
    """(R, min(R, D)) left singular vectors of (R, D), that of the largest value first."""
    return torch.linalg.svd(matrix, full_matrices=False)[0]


def normal_cdf(x: Tensor) -> Tensor:
    """Distribution function of the standard normal."""
    return torch.special.ndtr(x)
