"""Least-squares compensation of cut inputs, for any keep counts from one factorisation a layer.

With x the unfolded input (mean mu, covariance Sigma), W the original weight (N, D) and S the kept
inputs:
    A = Sigma_SS,  B = Sigma_S: W^T,  W' = (A^-1 B)^T,  bias + (W mu - W' mu_S),
then, where a BN layer follows, each row of W' is scaled so that the output keeps its variance, as
the BN statistics expect. Because orders are nested, the kept inputs of one group are a prefix of
the permuted ones: with Sigma = L L^T and Z = L^-1 Sigma W^T = L^T W^T made once, W'^T =
L_SS^-T Z_S, one triangular solve, and the explained output variance is the column sums of Z_S^2.
Inputs concatenated from several groups are no prefix: their L_SS is factored anew.

Source: CaP (arXiv 2108.13728; formulas from its authors' code). Ours: the factor of the whole
serves every prefix; the ridge (1e-4 of the mean variance) acts as noise on each input, so that
nothing cut means nothing changed; the intercept moves the running mean of a lone BN instead of
adding a bias. A layer with neither BN nor bias goes without an intercept.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cacp_ray.pruning.plan import Consumer, Plan
from cacp_ray.pruning.statistics import InputMoments, regularized
from cacp_ray.pruning.surgery import Orders, Slicer

CACHE_BYTES = 512 * 2**20


@dataclass(frozen=True)
class LayerFactors:
    """What compensation of one layer needs, inputs in importance order.

    Attributes:
        lower: (D, D) Cholesky factor of the input covariance, float64.
        solved: (D, N) lower^T W^T.
        mean: (D,) of the inputs.
        output_mean: (N,) W mu, without bias.
        variance: (N,) of the outputs.
    """

    lower: Tensor
    solved: Tensor
    mean: Tensor
    output_mean: Tensor
    variance: Tensor


def make_factors(
    plan: Plan,
    tensors: Mapping[str, Tensor],
    moments: Mapping[str, InputMoments],
    orders: Orders,
) -> dict[str, LayerFactors]:
    """Factors of every consumer by weight name.

    Args:
        plan: Of the network.
        tensors: State dict in importance order (`reorder_weights`).
        moments: Of the original network, in its own order.
        orders: The importance order.
    """
    factors = {}
    for consumer in plan.consumers:
        weight = tensors[consumer.weight]
        taps = weight[0, 0].numel()
        index = torch.from_numpy(plan.axes[consumer.weight, 1].reordered(orders))
        rows = (index[:, None] * taps + torch.arange(taps)).flatten()
        covariance = torch.from_numpy(moments[consumer.weight].covariance)[rows][:, rows]
        lower = torch.linalg.cholesky(regularized(covariance))
        mean = torch.from_numpy(moments[consumer.weight].mean)[rows]
        flat = weight.flatten(1).double()
        solved = lower.T @ flat.T
        factors[consumer.weight] = LayerFactors(
            lower, solved, mean, flat @ mean, solved.square().sum(0)
        )
    return factors


class Compensator:
    """Compensated tensors for keep counts; solved layers are kept in a byte-bounded LRU cache."""

    def __init__(
        self, plan: Plan, tensors: Mapping[str, Tensor], factors: Mapping[str, LayerFactors]
    ) -> None:
        self._plan = plan
        self._tensors = tensors
        self._factors = factors
        self._slicer = Slicer(plan)
        self._cache: OrderedDict[tuple[str, tuple[int, ...]], tuple[Tensor, Tensor]] = OrderedDict()
        self._bytes = 0
        self._input_groups = {
            consumer.weight: sorted(set(plan.axes[consumer.weight, 1].group.tolist()) - {-1})
            for consumer in plan.consumers
        }

    def __call__(self, keep_counts: Sequence[int]) -> dict[str, Tensor]:
        """All tensors that follow groups, cut, with every consumer's inputs compensated."""
        small = self._slicer(self._tensors, keep_counts)
        for consumer in self._plan.consumers:
            weight, shift = self._solve(consumer, keep_counts)
            weight = self._slicer.cut(consumer.weight, 0, weight, keep_counts)
            shift = self._slicer.cut(consumer.weight, 0, shift, keep_counts)
            small[consumer.weight] = weight
            self._shift(small, consumer, shift)
        return small

    def _shift(self, small: dict[str, Tensor], consumer: Consumer, shift: Tensor) -> None:
        """Adds the intercept to the bias, or takes it off the running mean of the lone BN."""
        bias = f"{consumer.module}.bias"
        if bias in self._tensors:
            small[bias] = small.get(bias, self._tensors[bias]) + shift
        elif consumer.batch_norm is not None:
            mean = f"{consumer.batch_norm}.running_mean"
            small[mean] = small.get(mean, self._tensors[mean]) - shift

    def _solve(self, consumer: Consumer, keep_counts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Weight (N, kept inputs, ...) and intercept (N,), before outputs are cut."""
        counts = tuple(keep_counts[g] for g in self._input_groups[consumer.weight])
        key = (consumer.weight, counts)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        original = self._tensors[consumer.weight]
        factors = self._factors[consumer.weight]
        taps = original[0, 0].numel()
        kept = self._slicer.size(consumer.weight, 1, keep_counts)
        if kept is not None:
            rows = torch.arange(kept * taps)
            lower, solved = factors.lower[: len(rows), : len(rows)], factors.solved[: len(rows)]
        else:
            positions = torch.from_numpy(self._plan.axes[consumer.weight, 1].positions(keep_counts))
            rows = (positions[:, None] * taps + torch.arange(taps)).flatten()
            half = factors.lower[rows]
            lower = torch.linalg.cholesky(half @ half.T)
            solved = torch.linalg.solve_triangular(lower, half @ factors.solved, upper=False)
        weight = torch.linalg.solve_triangular(lower.T, solved, upper=True).T  # (N, |S|)
        if consumer.batch_norm is not None:
            explained = solved.square().sum(0)
            # Where the kept inputs explain nothing of an output, its mean alone is kept.
            is_explained = explained > 1e-9 * factors.variance
            scale = torch.where(is_explained, (factors.variance / explained).sqrt(), 0.0)
            weight = weight * scale[:, None]
        shift = (factors.output_mean - weight @ factors.mean[rows]).float()
        shaped = weight.float().reshape(len(weight), -1, *original.shape[2:])
        if original.ndim == 4:
            shaped = shaped.contiguous(memory_format=torch.channels_last)
        self._remember(key, (shaped, shift))
        return shaped, shift

    def _remember(self, key: tuple[str, tuple[int, ...]], value: tuple[Tensor, Tensor]) -> None:
        self._cache[key] = value
        self._bytes += value[0].nbytes + value[1].nbytes
        while self._bytes > CACHE_BYTES and len(self._cache) > 1:
            _, (weight, shift) = self._cache.popitem(last=False)
            self._bytes -= weight.nbytes + shift.nbytes
