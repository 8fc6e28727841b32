"""Least-squares compensation of cut inputs: one factorisation of a layer serves any keep counts.

Let x be the unfolded input (mean mu, covariance Sigma), W the original weight (N, D) and S the kept
inputs. The new weight W' and bias are
    A = Sigma_SS,  B = Sigma_S: W^T,  W' = (A^-1 B)^T,  bias + (W mu - W' mu_S).
Where a BN layer follows, each row of W' is then scaled so that the output keeps its variance, as
the BN statistics expect. Because orders are nested, the kept inputs of one group are a prefix of
the permuted ones. With Sigma = L L^T and Z = L^-1 Sigma W^T = L^T W^T made once,
    W'^T = (L_SS)^-T Z_S = ((L^-1)_SS)^T Z_S
is one matrix product, and the explained output variance is the column sums of Z_S^2.
Inputs concatenated from several groups are no prefix: their A is factored anew.

Large convolutions have Sigma = S x T: covariance between channels times covariance between taps.
The taps cancel in A^-1 B = (S_SS^-1 S_S:) x 1, so all of the above holds with S for Sigma and W as
(C, T * N); only variances need T.

Source: CaP (arXiv 2108.13728; formulas from its authors' code). Ours: one factor serves every
prefix; the separable form; the ridge (`regularized`) acts as noise on each input, so that a layer
without cut inputs does not change; the intercept moves the running mean of a lone BN instead of
adding a bias. A layer with neither BN nor bias goes without an intercept.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.data.transforms import from_shared
from cacp_ray.pruning.plan import Consumer, Plan
from cacp_ray.pruning.statistics import InputMoments, regularized
from cacp_ray.pruning.surgery import Cutter, Orders
from cacp_ray.pruning.torch_types import cholesky, solve_triangular

CACHE_BYTES = 128 * 2**20


@dataclass(frozen=True)
class LayerFactors:
    """What the compensation of one layer needs, as arrays with inputs in importance order.

    The R rows are D inputs (T = 1), or C channels of a separable covariance with T taps. Where kept
    inputs are a prefix, factors are computed in float64 and stored in float32, which is enough for
    the products that remain.
    """

    matrix: NDArray[Any]  # (R, R) float32 L^-1 for a prefix, else the float64 covariance
    right: NDArray[Any]  # (R, T, N) float32 Z = L^T W^T for a prefix, else float64 Sigma W^T
    explained: NDArray[np.float32]  # (R, N) variance that the first r + 1 rows explain, or empty
    taps: NDArray[np.float64]  # (T, T) covariance between taps
    mean: NDArray[np.float32]  # (D,) mean of the inputs
    output_mean: NDArray[np.float32]  # (N,) W mu, without bias
    variance: NDArray[np.float32]  # (N,) variance of the outputs


def make_factors(
    plan: Plan, tensors: Mapping[str, Tensor], moments: Mapping[str, InputMoments], orders: Orders
) -> dict[str, LayerFactors]:
    """Factors of every consumer that has moments, by weight name.

    `tensors` are in importance order (`reorder_weights`), `moments` in that of the base network.
    """
    factors: dict[str, LayerFactors] = {}
    for consumer in plan.consumers:
        if consumer.weight not in moments:
            continue
        moment = moments[consumer.weight]
        weight = tensors[consumer.weight]
        taps = torch.ones(1, 1).double() if moment.taps is None else torch.as_tensor(moment.taps)
        axis = plan.axes[consumer.weight, 1]
        size = weight[0, 0].numel()  # k * k
        inputs = (axis.reordered(orders)[:, None] * size + np.arange(size)).ravel()  # (D,)
        rows = torch.as_tensor(inputs[:: len(taps)] // len(taps))  # (R,)
        covariance = regularized(torch.as_tensor(moment.covariance)[rows][:, rows])
        mean = torch.as_tensor(moment.mean[inputs])
        flat = weight.flatten(1).double()
        columns = flat.T.reshape(len(rows), -1)  # (R, T * N)
        shape = (len(rows), len(taps), len(flat))
        if axis.single_group is not None:
            lower = cholesky(covariance)
            identity = torch.eye(len(rows), dtype=torch.float64)
            matrix = solve_triangular(lower, identity, upper=False).float()
            right = (lower.T @ columns).reshape(shape)
            explained = _energy(right, taps).cumsum(0)
            variance = explained[-1]
            right = right.float()
        else:
            matrix = covariance
            right = (covariance @ columns).reshape(shape)
            explained = torch.empty(0)
            variance = (columns.reshape(shape) * torch.matmul(taps, right)).sum((0, 1))
        factors[consumer.weight] = LayerFactors(
            matrix=matrix.numpy(),
            right=right.numpy(),
            explained=explained.float().numpy(),
            taps=taps.numpy(),
            mean=mean.float().numpy(),
            output_mean=(flat @ mean).float().numpy(),
            variance=variance.float().numpy(),
        )
    return factors


def _energy(rows: Tensor, taps: Tensor) -> Tensor:
    """(R, N) variance that each row (R, T, N) adds to the outputs."""
    return (rows * torch.matmul(taps, rows)).sum(1)


class Compensator:
    """Cuts and compensates tensors; an LRU cache of CACHE_BYTES keeps solved layers."""

    def __init__(
        self, plan: Plan, tensors: Mapping[str, Tensor], factors: Mapping[str, LayerFactors]
    ) -> None:
        self._plan = plan
        self._tensors = tensors
        self._consumers = [c for c in plan.consumers if c.weight in factors]
        self._factors = {
            name: {
                field: from_shared(value).to(tensors[name].device)
                for field, value in vars(layer).items()
            }
            for name, layer in factors.items()
        }
        self._cutter = Cutter(plan)
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        self._input_groups = {
            consumer.weight: plan.axes[consumer.weight, 1].groups for consumer in self._consumers
        }

    def __call__(self, keep_counts: Sequence[int]) -> dict[str, Tensor]:
        """All tensors that follow groups, cut, with every consumer's inputs compensated."""
        small = self._cutter(self._tensors, keep_counts)
        for consumer in self._consumers:
            weight, shift = self._solve(consumer, keep_counts)
            small[consumer.weight] = self._cutter.cut(consumer.weight, 0, weight, keep_counts)
            shift = self._cutter.cut(consumer.weight, 0, shift, keep_counts)
            bias, mean = f"{consumer.module}.bias", f"{consumer.batch_norm}.running_mean"
            if bias in self._tensors:
                small[bias] = small.get(bias, self._tensors[bias]) + shift
            elif consumer.batch_norm is not None:
                small[mean] = small.get(mean, self._tensors[mean]) - shift
        return small

    def _solve(self, consumer: Consumer, keep_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weight (N, kept inputs, ...) and intercept (N,), before outputs are cut."""
        counts = tuple(keep_counts[g] for g in self._input_groups[consumer.weight])
        key = (consumer.weight, counts)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        original = self._tensors[consumer.weight]
        factors = self._factors[consumer.weight]
        num_taps = len(factors["taps"])
        size = original[0, 0].numel()
        kept = self._cutter.size(consumer.weight, 1, keep_counts)
        if kept is not None:
            solved, explained = _solve_prefix(factors, kept * size // num_taps)
            mean = factors["mean"][: kept * size]
        else:
            positions = torch.as_tensor(self._plan.axes[consumer.weight, 1].positions(keep_counts))
            inputs = (positions[:, None] * size + torch.arange(size)).flatten().to(original.device)
            solved, explained = _solve_any(factors, inputs[::num_taps] // num_taps)
            mean = factors["mean"][inputs]
        weight = solved.reshape(len(mean), -1)  # (|S|, N)
        if consumer.batch_norm is not None:
            # An output of which the kept inputs explain nothing keeps its mean alone.
            is_explained = explained > 1e-9 * factors["variance"]
            scale = torch.where(is_explained, (factors["variance"] / explained).sqrt(), 0.0)
            weight = weight * scale
        shift = factors["output_mean"] - mean @ weight
        shaped = weight.T.reshape(weight.shape[1], -1, *original.shape[2:])
        layout = torch.channels_last if original.ndim == 4 else torch.contiguous_format
        shaped = shaped.contiguous(memory_format=layout)
        self._cache[key] = shaped, shift
        self._bytes += shaped.nbytes + shift.nbytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            _, oldest = self._cache.popitem(last=False)
            self._bytes -= sum(tensor.nbytes for tensor in oldest)
        return shaped, shift


def _solve_prefix(factors: Mapping[str, Tensor], rows: int) -> tuple[Tensor, Tensor]:
    """A^-1 B (rows, T * N) and explained variance (N,) for the first `rows` rows."""
    right = factors["right"][:rows].flatten(1)
    return factors["matrix"][:rows, :rows].T @ right, factors["explained"][rows - 1]


def _solve_any(factors: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
    """A^-1 B (rows, T * N) and explained variance (N,) for any rows."""
    lower = cholesky(factors["matrix"][rows][:, rows])
    right = factors["right"][rows]
    half = solve_triangular(lower, right.flatten(1), upper=False)
    solved = solve_triangular(lower.T, half, upper=True)
    explained = _energy(half.reshape(right.shape), factors["taps"])
    return solved.float(), explained.sum(0).float()
