"""Tries a plan out: a size that the network keeps in a Python attribute shows only then.

Small networks are cut, run, counted and compared with the whole network whose cut channels are
zero. A group that fails stays whole, with the reason, rather than break a search later.
"""

import copy
import logging
from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.cutter import Cutter, Orders, all_tensors, reorder_weights
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.resizable import ResizableNetwork

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4  # share of the largest output, in the dtype of the network
WIDE_TOLERANCE = 1e-6  # the same in float64
Counts = NDArray[np.int64]


def find_failures(model: nn.Module, plan: Plan, example_input: Tensor) -> dict[int, str]:
    """Groups that fail when they are cut -> the reason, although their labels allow the cut.

    Raises:
        UnsupportedModelError: The network cannot be copied, or does not answer alike twice.
    """
    try:
        trial = _Trial(model, plan, example_input)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(f"the network cannot be copied ({reason})") from error
    whole, least = plan.cost_model.num_channels, plan.least_counts
    if (problem := trial.problem(whole, [], compare=True)) is not None:
        raise UnsupportedModelError(
            f"the network does not answer alike twice in evaluation mode ({problem}): switch off "
            "what is random or counts in a forward pass"
        )
    some = np.random.default_rng(0).integers(least, np.maximum(whole, least + 1))
    targets = [some, least]
    # Any two groups must also be cut apart: one size in the code may stand for both.
    for bit in range(int(np.ceil(np.log2(max(2, len(whole)))))):
        is_set = np.arange(len(whole)) >> bit & 1 == 1
        targets += [np.where(is_set, least, whole), np.where(is_set, whole, least)]
    failures: dict[int, str] = {}
    for number, target in enumerate(targets):
        groups = [g for g in range(len(whole)) if g not in failures and target[g] < whole[g]]
        failures |= _culprits(trial, target, groups, compare=number < 2)
    return failures


def _culprits(
    trial: "_Trial", target: Counts, groups: list[int], *, compare: bool
) -> dict[int, str]:
    """Finds, by halving, which of `groups` fail when only they are cut to `target`."""
    problem = trial.problem(target, groups, compare=compare) if groups else None
    if problem is None:
        return {}
    if len(groups) == 1:
        return {groups[0]: problem}
    middle = len(groups) // 2
    halves = groups[:middle], groups[middle:]
    failures = {
        group: reason
        for half in halves
        for group, reason in _culprits(trial, target, half, compare=compare).items()
    }
    return failures or {groups[-1]: problem}  # the halves fail only together


class _Trial:
    """Cuts one network and tells what is wrong with the result."""

    def __init__(self, model: nn.Module, plan: Plan, example_input: Tensor) -> None:
        self._plan = plan
        self._model = model
        self._cutter = Cutter(plan)
        self._input = example_input
        if bool((example_input == example_input.flatten()[0]).all()):
            # An input of zeros would hide what goes wrong.
            noise = torch.rand(example_input.shape, generator=torch.Generator().manual_seed(0))
            self._input = noise.to(example_input)
        rng = np.random.default_rng(1)
        self._orders = [rng.permutation(group.num_channels) for group in plan.groups]
        self._normalised = np.isin(np.arange(len(plan.groups)), plan.normalised)
        nets = _Networks(model, plan)
        self._nets = {example_input.dtype: nets}
        self._shapes = [output.shape for output in _run(nets.small.model, self._input)]

    def problem(self, target: Counts, groups: list[int], *, compare: bool) -> str | None:
        """Why cutting these groups fails, in one line; `compare` checks the outputs too."""
        whole = self._plan.cost_model.num_channels
        keep_counts = whole.copy()
        keep_counts[groups] = target[groups]
        nets = self._nets[self._input.dtype]
        # Groups that stay whole keep their own order.
        orders = [
            order if compare and group in groups else np.arange(len(order))
            for group, order in enumerate(self._orders)
        ]
        try:
            with FlopCounterMode(display=False) as counter:
                small = _run(nets.cut(self._cutter, orders, keep_counts), self._input)
        except Exception as error:
            logger.debug("cut of groups %s: %s", groups, error)
            return "its code fixes a size: the network does not run when they are cut"
        if [t.shape for t in small] != self._shapes:
            return "the output changes its shape when they are cut"
        if counter.get_total_flops() // 2 != int(self._plan.macs(keep_counts)):
            return "the network costs other than predicted when they are cut"
        if not compare:
            return None
        # Fewer channels are normalised to other values than zeros in their place.
        counts = np.where(self._normalised, whole, keep_counts)
        if not any(self._is_same(orders, counts, d) for d in (self._input.dtype, torch.float64)):
            return "cutting them is not the same as zeros in their place"
        return None

    def _is_same(self, orders: Orders, counts: Counts, dtype: torch.dtype) -> bool:
        """Whether cut and masked networks agree; an untrained network may need float64."""
        if dtype not in self._nets:
            wide = copy.deepcopy(self._model).to(dtype)
            self._nets[dtype] = _Networks(wide, self._plan)
        nets = self._nets[dtype]
        small = _run(nets.cut(self._cutter, orders, counts), self._input.to(dtype))
        masked = _run(nets.mask(orders, counts), self._input.to(dtype))
        tolerance = WIDE_TOLERANCE if dtype == torch.float64 else TOLERANCE
        return all(
            _is_close(one, other, tolerance) for one, other in zip(small, masked, strict=True)
        )


def _is_close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    if not torch.equal(one.isfinite(), other.isfinite()):
        return False
    one, other = (t.nan_to_num(0.0, 0.0, 0.0).double() for t in (one, other))
    largest = other.abs().max() if other.numel() else 0.0
    return bool(((one - other).abs() <= tolerance * largest + 1e-30).all())


class _Networks:
    """Two copies of a network: one to reorder and cut, one to put zeros in."""

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        self._plan = plan
        self._tensors = all_tensors(model)
        self.small, self._masked = ResizableNetwork(model), ResizableNetwork(model)
        self._ordered = b"", self._tensors  # the last order and its tensors

    def cut(self, cutter: Cutter, orders: Orders, keep_counts: Counts) -> nn.Module:
        """The small network, with its channels in importance order."""
        key = np.concatenate(orders).tobytes()
        if key != self._ordered[0]:
            self._ordered = key, reorder_weights(self._plan, self._tensors, orders)
        return self.small.load(cutter(self._ordered[1], keep_counts.tolist()))

    def mask(self, orders: Orders, keep_counts: Counts) -> nn.Module:
        """The whole network with zeros in place of cut channels."""
        return self._masked.load(zero_channels(self._plan, self._tensors, keep_counts, orders))


def zero_channels(
    plan: Plan, tensors: Mapping[str, Tensor], keep_counts: Counts, orders: Orders
) -> dict[str, Tensor]:
    """Whole tensors in their own order, with zeros where a cut to keep counts (G,) removes some."""
    zeroed = {name: tensors[name].clone() for name, _ in plan.axes}
    for (name, dim), axis in plan.axes.items():
        gone = np.setdiff1d(np.arange(len(axis.group)), axis.positions(keep_counts))
        index = torch.as_tensor(axis.reordered(orders)[gone])
        zeroed[name].index_fill_(dim, index, 0)
    return zeroed


def _run(model: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs of one pass."""
    with torch.no_grad():
        return [t for t in tree_flatten(model(x.clone()))[0] if isinstance(t, Tensor)]


def count_macs(model: nn.Module, example_input: Tensor) -> int:
    """MACs for one input, counted by PyTorch in a forward pass."""
    model.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example_input)
    return counter.get_total_flops() // 2
