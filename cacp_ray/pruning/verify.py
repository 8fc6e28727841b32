"""Tries a plan out: a size that the network keeps in a Python attribute shows only then.

Small networks are cut, run, counted and compared with the whole network whose cut channels are
zero. A group that fails stays whole, with the reason, rather than break a search later.
"""

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode

from cacp_ray.errors import UnsupportedModelError, is_out_of_memory
from cacp_ray.pruning.flops import without_fast_paths
from cacp_ray.pruning.inputs import Inputs, call, map_inputs, repeat_batch, tensors_of
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.surgery import Cutter, Orders, all_tensors, reorder_weights
from cacp_ray.pruning.torch_types import backpropagate, own_random_state

logger = logging.getLogger(__name__)
DOES_NOT_TRAIN = "the network does not train when they are cut"
TOLERANCE = 1e-4  # share of the largest output, in the dtype of the network
WIDE_TOLERANCE = 1e-6  # the same in float64
Counts = NDArray[np.int64]
Shapes = list[torch.Size]


@dataclass(frozen=True)
class Check:
    """What is checked of a small network, besides that it runs and costs what was predicted."""

    compares: bool = False  # its outputs, with those of the whole network with zeros
    trains: bool = False  # a step of training


def find_failures(model: nn.Module, plan: Plan, inputs: Inputs) -> dict[int, str]:
    """Groups that fail when they are cut -> the reason, although their labels allow the cut.

    Raises:
        UnsupportedModelError: The network cannot be copied, or does not answer alike twice.
    """
    try:
        trial = _Trial(model, plan, inputs)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        reason = _first_line(error)
        raise UnsupportedModelError(f"the network cannot be copied ({reason})") from error
    whole, least = plan.cost_model.num_channels, plan.least_counts
    if (problem := trial.problem(whole, [], Check(compares=True))) is not None:
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
        check = Check(compares=number < 2, trains=target is least)
        failures |= _culprits(trial, target, groups, check)
    return failures


def _culprits(trial: "_Trial", target: Counts, groups: list[int], check: Check) -> dict[int, str]:
    """Finds, by halving, which of `groups` fail when only they are cut to `target`."""
    problem = trial.problem(target, groups, check) if groups else None
    if problem is None:
        return {}
    if len(groups) == 1:
        return {groups[0]: problem}
    middle = len(groups) // 2
    halves = groups[:middle], groups[middle:]
    failures = {
        group: reason
        for half in halves
        for group, reason in _culprits(trial, target, half, check).items()
    }
    return failures or {groups[-1]: problem}  # the halves fail only together


class _Trial:
    """Cuts one network and tells what is wrong with the result."""

    def __init__(self, model: nn.Module, plan: Plan, inputs: Inputs) -> None:
        self._plan = plan
        self._model = model
        self._cutter = Cutter(plan)
        self._inputs = map_inputs(_without_zeros, inputs)
        self._dtype = next(
            (x.dtype for x in tensors_of(inputs) if x.is_floating_point()), torch.float32
        )
        rng = np.random.default_rng(1)
        self._orders = [rng.permutation(group.num_channels) for group in plan.groups]
        self._normalised = np.isin(np.arange(len(plan.groups)), plan.normalised)
        nets = _Networks(model, plan)
        self._nets = {self._dtype: nets}
        self._varying: set[tuple[int, int]] = set()  # outputs and dimensions whose size varies
        self._shapes = [output.shape for output in _run(nets.small.model, self._inputs)]
        self._trains = _train_once(nets.small.model, self._inputs) is None

    def problem(self, target: Counts, groups: list[int], check: Check) -> str | None:
        """Why cutting these groups fails, in one line."""
        whole = self._plan.cost_model.num_channels
        keep_counts = whole.copy()
        keep_counts[groups] = target[groups]
        nets = self._nets[self._dtype]
        # Groups that stay whole keep their own order.
        orders = [
            order if check.compares and group in groups else np.arange(len(order))
            for group, order in enumerate(self._orders)
        ]
        try:
            with FlopCounterMode(display=False) as counter:
                net = nets.cut(self._cutter, orders, keep_counts)
                small = _run(net, self._inputs)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.debug("cut of groups %s: %s", groups, error)
            return f"the network does not run when they are cut ({_first_line(error)})"
        if not self._is_expected([t.shape for t in small], orders, keep_counts):
            return "the output changes its shape when they are cut"
        if counter.get_total_flops() // 2 != int(self._plan.macs(keep_counts)):
            return "the network costs other than predicted when they are cut"
        if not check.compares:
            return None
        if check.trains and self._trains and (fault := _train_once(net, self._inputs)) is not None:
            return f"{DOES_NOT_TRAIN} ({fault})"
        return self._difference(orders, keep_counts)

    def _is_expected(self, shapes: Shapes, orders: Orders, keep_counts: Counts) -> bool:
        """Whether outputs have the sizes of the whole network, but for those that depend on data.

        A detector returns as many boxes as it finds. A size depends on data if the whole network
        changes it too, with zeros in place of the channels or with other inputs.
        """
        if shapes == self._shapes:
            return True
        net = self._nets[self._dtype].mask(orders, keep_counts)
        others = [map_inputs(partial(_noise, seed=seed), self._inputs) for seed in (1, 2)]
        seen = [[t.shape for t in _run(net, x)] for x in (self._inputs, *others)]
        if len(shapes) != len(self._shapes):
            return len(shapes) in map(len, seen)
        self._varying |= {place for other in seen for place in _changes(self._shapes, other)}
        return _changes(self._shapes, shapes) <= self._varying

    def _difference(self, orders: Orders, keep_counts: Counts) -> str | None:
        """What differs between a cut and zeros in its place, if anything does."""
        whole = self._plan.cost_model.num_channels
        # Fewer channels are normalised to other values than zeros in their place.
        counts = np.where(self._normalised, whole, keep_counts)
        if any(self._is_same(orders, counts, d) for d in (self._dtype, torch.float64)):
            return None
        return "cutting them is not the same as zeros in their place"

    def _is_same(self, orders: Orders, counts: Counts, dtype: torch.dtype) -> bool:
        """Whether cut and masked networks agree; an untrained network may need float64."""
        if dtype not in self._nets:
            wide = copy.deepcopy(self._model).to(dtype)
            self._nets[dtype] = _Networks(wide, self._plan)
        nets = self._nets[dtype]
        inputs = map_inputs(lambda x: x.to(dtype) if x.is_floating_point() else x, self._inputs)
        small = _run(nets.cut(self._cutter, orders, counts), inputs)
        masked = _run(nets.mask(orders, counts), inputs)
        tolerance = WIDE_TOLERANCE if dtype == torch.float64 else TOLERANCE
        return len(small) == len(masked) and all(map(partial(_is_close, tolerance), small, masked))


def _changes(one: Shapes, other: Shapes) -> set[tuple[int, int]]:
    """Outputs and dimensions whose sizes differ; dimension -1 where their number does."""
    changes: set[tuple[int, int]] = set()
    for number, (first, second) in enumerate(zip(one, other, strict=False)):
        if len(first) != len(second):
            changes.add((number, -1))
        else:
            changes |= {(number, d) for d in range(len(first)) if first[d] != second[d]}
    return changes


def _is_close(tolerance: float, one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
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


def _noise(tensor: Tensor, seed: int) -> Tensor:
    """Another input of the same kind."""
    if not tensor.is_floating_point():
        return tensor
    return torch.rand(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor)


def _without_zeros(tensor: Tensor) -> Tensor:
    """The input, or noise where it is constant, which would hide what goes wrong."""
    if not tensor.is_floating_point() or bool((tensor != tensor.flatten()[0]).any()):
        return tensor
    return _noise(tensor, seed=0)


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All outputs of one pass."""
    with torch.no_grad(), without_fast_paths():
        output = call(model, map_inputs(torch.clone, inputs))
    return [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]


def _train_once(model: nn.Module, inputs: Inputs) -> str | None:
    """Why a copy of a network fails in a step of training, in one line; None where it does not."""
    net = copy.deepcopy(model).train()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    try:
        with torch.enable_grad(), own_random_state():
            output = call(net, map_inputs(torch.clone, repeat_batch(inputs)))
            outputs = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
            losses = [t.float().mean() for t in outputs if t.requires_grad]
            if losses:
                backpropagate(torch.stack(losses).sum())
    except Exception as error:  # the network's own code
        if is_out_of_memory(error):
            raise
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def count_macs(model: nn.Module, inputs: Inputs) -> int:
    """MACs for one input, counted by PyTorch in a forward pass."""
    model.eval()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        # PyTorch's counter fails at views of parameters that are trained.
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad(), without_fast_paths(), FlopCounterMode(display=False) as counter:
            call(model, inputs)
    finally:
        for parameter in trained:
            parameter.requires_grad_()
    return counter.get_total_flops() // 2
