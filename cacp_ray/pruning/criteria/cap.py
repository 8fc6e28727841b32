"""CaP: greedy forward selection of channels by the output energy that they explain.

The selection starts empty and appends the channel whose inputs to the consuming layers explain most
of the output energy that is still unexplained after optimal (least-squares) compensation. With S
the Schur complement of the input covariance given the chosen channels, W the weight (N, D) and
H = S W^T W S, a channel t of b inputs explains tr(S_tt^-1 H_tt) more. Choosing it, with
L L^T = S_tt, C = L^-1 S_t: and U = L^-1 H_t: - (L^-1 H_tt L^-T) C / 2, turns S and H into
    S - C^T C   and   H - C^T U - U^T C.
Only rows of chosen channels and the diagonal blocks are needed at once, so these products are
applied in batches of STEP rows, to the channels that are left: D^3 work at the speed of matrix
products, as in a blocked Cholesky factorisation with pivoting.

Source: after CaP (arXiv 2108.13728, as in its authors' code: the score and the greedy choice).
Ours: several consumers add up, each as a share of the energy of its whole output; the ridge of the
compensation; H instead of S W^T, and the batches; covariances that are separable over taps.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.errors import EvaluationError
from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.criteria.common import Scores, Tensors, fill
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import RIDGE, InputMoments, Statistics, regularized
from cacp_ray.pruning.torch_types import cholesky, solve_triangular, tensordot, try_cholesky

MOST_TRIES = 60  # each try has ten times the noise: more than any finite covariance needs
STEP = 72  # rows; 48 to 144 are equally fast
SILENT = 1e-12  # mean variance of a dead group: not more than the noise that is added to it
LEAST_GAIN = 1e-12  # keeps scores strictly decreasing where nothing is left to explain


def score_cap(plan: Plan, tensors: Tensors, statistics: Statistics, seed: int) -> Scores:
    """Share of the consumers' output energy that is unexplained when the channel is chosen.

    Shares are summed over consumers: a stream that ten layers read starts at 10, or less where
    other channels feed the same layers. A group whose channels never change explains nothing.
    Scores are comparable across groups: one threshold for all groups leaves the same unexplained
    share in each. An SE squeeze layer, which reads the pooled channels, counts as any consumer. A
    group without consumers takes its L1 scores, scaled to the mean of the others.
    """
    inputs = statistics.inputs
    read = {c.weight: plan.axes[c.weight, 1] for c in plan.consumers if c.weight in inputs}
    shared = {name for name, axis in read.items() if (axis.group != axis.group[0]).any()}
    energies = {name: output_energy(inputs[name], tensors[name]) for name in shared}
    scores: Scores = []
    known = np.zeros(len(plan.groups), dtype=np.bool_)
    for g, group in enumerate(plan.groups):
        layers: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by rows of a channel
        for name, axis in read.items():
            if (axis.group == g).any():
                schur, gram, energy = _make_layer(inputs[name], tensors[name], axis, g)
                block = len(schur) // group.num_channels
                gram /= energies.get(name, energy)
                layers.setdefault(block, []).append((schur, gram))
        scores.append(_select(layers, group.num_channels))
        known[g] = bool(layers)
    return fill(scores, known, plan, tensors)


def output_energy(moments: InputMoments, weight: Tensor) -> float:
    """The positive sum of the variances of a layer's outputs, with the noise of the ridge."""
    covariance, taps, flat = _as_tensors(moments, weight)
    return _energy(tensordot(covariance, flat), taps, flat)


def _energy(cross: Tensor, taps: Tensor, flat: Tensor) -> float:
    return float((cross @ taps).flatten() @ flat.flatten()) + 1e-30


def _as_tensors(moments: InputMoments, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Regularised covariance (D, D), covariance between taps (T, T), and weight (D, N, T).

    In separable form tap t of output n acts as an output of its own on the covariance between
    channels, correlated with the other taps. T is 1 in any other form.
    """
    covariance = _make_positive(torch.as_tensor(moments.covariance).double())
    taps = torch.ones(1, 1).double() if moments.taps is None else torch.as_tensor(moments.taps)
    flat = weight.double().reshape(len(weight), len(covariance), len(taps))
    return covariance, taps, flat.transpose(0, 1).contiguous()


def _make_positive(covariance: Tensor) -> Tensor:
    """Regularises with more noise where rounding left eigenvalues too negative for `regularized`.

    Raises:
        EvaluationError: The covariance is not finite.
    """
    result = regularized(covariance)
    identity = torch.eye(len(result), dtype=torch.float64)
    noise = RIDGE * covariance.diagonal().mean().abs() + 1e-12
    # Half of the noise must do: the other half keeps all that follows away from zero.
    for _ in range(MOST_TRIES if covariance.isfinite().all() else 0):
        if try_cholesky(result - noise / 2 * identity)[1] == 0:
            return result
        noise *= 10
        result = covariance + noise * identity
    raise EvaluationError(
        "criterion cap: an input covariance is not finite; check that the network gives finite "
        "activations on the calibration data, then collect the statistics again"
    )


def _make_layer(
    moments: InputMoments, weight: Tensor, axis: Axis, group: int
) -> tuple[Tensor, Tensor, float]:
    """S and H (D, D) of one group's inputs to a layer, and the output energy of these inputs.

    Rows of one channel are neighbours.
    """
    # A position of the axis has several rows (taps of a convolution), or several positions share
    # one (a flattened map whose places are the taps of the separable form).
    size = max(1, len(moments.covariance) // len(axis.group))
    step = max(1, len(axis.group) // len(moments.covariance))
    positions = np.flatnonzero(axis.group[::step] == group)
    positions = positions[np.argsort(axis.channel[::step][positions], kind="stable")]
    rows = (positions[:, None] * size + np.arange(size)).ravel()
    part = InputMoments(moments.mean, moments.covariance[np.ix_(rows, rows)], moments.taps)
    taps = 1 if moments.taps is None else len(moments.taps)
    columns = weight.reshape(len(weight), -1, taps)[:, torch.as_tensor(rows)]
    covariance, between, flat = _as_tensors(part, columns)
    cross = tensordot(covariance, flat)  # (D, N, T)
    gram = (cross @ between).flatten(1) @ cross.flatten(1).T
    if part.covariance.diagonal().mean() <= SILENT:
        gram.zero_()  # else the share of the ridge's own noise would be told
    return covariance, gram, _energy(cross, between, flat)


class _Selection:
    """S and H (P, D, D) of P consumers with `block` rows for a channel, as channels are chosen."""

    def __init__(self, schur: Tensor, gram: Tensor, block: int) -> None:
        self._schur, self._gram, self._block = schur, gram, block
        self._left = torch.arange(schur.shape[1] // block)  # channels whose rows are still here
        self._is_chosen = torch.zeros(len(self._left), dtype=torch.bool)
        self._start()

    def _start(self) -> None:
        """Begins a batch of rows, when S and H hold all earlier choices."""
        shape = (len(self._schur), STEP + self._block, self._schur.shape[1])
        self._c, self._u = self._schur.new_empty(shape), self._schur.new_empty(shape)
        self._used = 0
        self._schur_blocks = self._diagonal(self._schur)
        self._gram_blocks = self._diagonal(self._gram)

    def _diagonal(self, matrix: Tensor) -> Tensor:
        """(P, C, b, b) diagonal blocks, as a copy."""
        count, block = len(self._left), self._block
        blocks = matrix.view(len(matrix), count, block, count, block)
        return blocks.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()

    def gains(self, num_channels: int) -> Tensor:
        """(C,) newly explained energy, summed over consumers; undefined for chosen channels."""
        if self._block == 1:
            gain = (self._gram_blocks / self._schur_blocks)[:, :, 0, 0]
        else:
            factor, _ = try_cholesky(self._schur_blocks)
            solved = torch.cholesky_solve(self._gram_blocks, factor)
            gain = solved.diagonal(dim1=2, dim2=3).sum(2)
        result = gain.new_zeros(num_channels)
        result[self._left] = gain.sum(0)
        return result

    def choose(self, channel: int) -> None:
        """Removes what a channel explains from S and H."""
        at = int(torch.searchsorted(self._left, channel))
        rows = slice(at * self._block, (at + 1) * self._block)
        c, u = self._c[:, : self._used], self._u[:, : self._used]  # (P, K, D)
        c_rows, u_rows = c[:, :, rows].mT, u[:, :, rows].mT
        schur = self._schur[:, rows] - c_rows @ c  # (P, b, D)
        gram = self._gram[:, rows] - c_rows @ u - u_rows @ c
        factor = cholesky(schur[:, :, rows])
        new_c = solve_triangular(factor, schur, upper=False)
        solved = solve_triangular(factor, gram, upper=False)
        inner = solve_triangular(factor, solved[:, :, rows].mT, upper=False)
        new_u = solved - 0.5 * inner @ new_c
        self._c[:, self._used : self._used + self._block] = new_c
        self._u[:, self._used : self._used + self._block] = new_u
        self._used += self._block
        self._is_chosen[at] = True
        if self._used >= STEP:
            self._apply()
            return
        shape = (*new_c.shape[:2], len(self._left), self._block)
        c_blocks = new_c.view(shape).transpose(1, 2)  # (P, C, b, b)
        u_blocks = new_u.view(shape).transpose(1, 2)
        self._schur_blocks -= c_blocks.mT @ c_blocks
        product = c_blocks.mT @ u_blocks
        self._gram_blocks -= product + product.mT

    def _apply(self) -> None:
        """Applies the batch to S and H, and drops the rows of chosen channels if they are many."""
        c, u = self._c[:, : self._used], self._u[:, : self._used]
        if self._is_chosen.sum() * 8 > len(self._left):
            keep = torch.nonzero(~self._is_chosen)[:, 0]
            rows = (keep[:, None] * self._block + torch.arange(self._block)).flatten()
            c, u = c[:, :, rows], u[:, :, rows]
            self._schur = self._schur[:, rows[:, None], rows]
            self._gram = self._gram[:, rows[:, None], rows]
            self._left, self._is_chosen = self._left[keep], self._is_chosen[keep]
        self._schur.baddbmm_(c.mT, c, alpha=-1)
        self._gram.baddbmm_(c.mT, u, alpha=-1).baddbmm_(u.mT, c, alpha=-1)
        self._start()


def _select(
    layers: Mapping[int, list[tuple[Tensor, Tensor]]], num_channels: int
) -> NDArray[np.float64]:
    """(C,) scores, strictly decreasing in the order of choice; zeros without layers.

    `layers` holds (S, H) of every consumer, by the number of rows that a channel has.
    """
    if not layers:
        return np.zeros(num_channels)
    selections: list[_Selection] = []
    for block, pairs in layers.items():
        schurs, grams = zip(*pairs, strict=True)
        selections.append(_Selection(torch.stack(schurs), torch.stack(grams), block))
    order, gains = np.empty(num_channels, dtype=np.int64), np.empty(num_channels)
    is_taken = torch.zeros(num_channels, dtype=torch.bool)
    for step in range(num_channels):
        gain = torch.stack([s.gains(num_channels) for s in selections]).sum(0)
        best = int(gain.masked_fill(is_taken, -torch.inf).argmax())
        order[step], gains[step] = best, gain[best]
        is_taken[best] = True
        for selection in selections:
            selection.choose(best)
    scores = np.empty(num_channels)
    scores[order] = np.cumsum(np.maximum(gains, LEAST_GAIN)[::-1])[::-1]
    return scores
