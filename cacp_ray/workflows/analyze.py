"""A network's channel groups, exact cost and small copies, without a search."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import nn

from cacp_ray.config.run import PruningConfig
from cacp_ray.config.saved import check_new
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.preparation import CutNetwork, hash_weights, prepare
from cacp_ray.io.rates import format_rate
from cacp_ray.models.factory import (
    CIFAR_MODELS,
    GIVEN,
    build_model,
    default_input_shape,
    default_num_classes,
)
from cacp_ray.pruning.arguments import Argument, describe_inputs, make_inputs, read_arguments
from cacp_ray.pruning.calibration import (
    Examples,
    Loss,
    classify,
    inputs_together,
    read_examples,
)
from cacp_ray.pruning.cost import ChannelGroup
from cacp_ray.pruning.criteria import rank_channels
from cacp_ray.pruning.inputs import Inputs, check_inputs, check_network, tensors_of
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.sequential import recover_sequentially
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.subnet import (
    MAX_INPUT,
    describe_kept,
    load_subnet,
    read_description,
    save_subnet,
)
from cacp_ray.pruning.surgery import Cutter, Orders, all_tensors, reorder_weights
from cacp_ray.searching.budget import Budget, uniform
from cacp_ray.training.metrics import find_device
from cacp_ray.workflows.network import find_channels
from cacp_ray.workflows.problem import OBJECT
from cacp_ray.workflows.setup import make_budget

Recover = bool | Literal["bn", "compensate", "layers"]


@dataclass
class Analysis:
    """What can be cut from one network.

    Attributes:
        model: The network.
        plan: Plan of the network.
        budget: Budget of its MACs.
        inputs: What the network is called with, for one example.
    """

    model: nn.Module
    plan: Plan
    budget: Budget
    inputs: Inputs
    _calibration: Examples | None = field(default=None, repr=False)
    _statistics: Statistics = field(default_factory=Statistics, repr=False)
    # What was built, as long as it is there: keep counts, orders and criterion.
    _built: WeakKeyDictionary[nn.Module, tuple[list[int], Orders, str]] = field(
        default_factory=WeakKeyDictionary[nn.Module, tuple[list[int], Orders, str]], repr=False
    )

    def __repr__(self) -> str:
        network, macs = type(self.model).__name__, self.budget.total
        return f"Analysis({network}, {len(self.groups)} channel groups, {macs:,} MACs)"

    @property
    def groups(self) -> tuple[ChannelGroup, ...]:
        """Channel groups in the order of the forward pass."""
        return self.plan.groups

    @property
    def reachable(self) -> tuple[float, float]:
        """Smallest and largest rate (share of the MACs kept)."""
        return self.budget.smallest / self.budget.total, 1.0

    def cost(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        """MACs of keep counts int (..., G) -> (...).

        Raises:
            ConfigError: Another number of groups, or a count outside 1 ... C of its group.
        """
        return self.plan.macs(self._check_counts(keep_counts))

    def uniform(self, rate: float) -> NDArray[np.int64]:
        """(G,) the same keep ratio in every group, within the budget of `rate` and using it up.

        Raises:
            ConfigError: The rate is no number.
            InfeasibleRateError: The rate cannot be reached.
        """
        self.budget.check(rate)
        return uniform(self.budget, [rate], np.ones(len(self.groups)))[0]

    def calibrate(
        self, loader: Iterable[Any], images: int = 1000, *, loss: Loss | None = None
    ) -> "Analysis":
        """Collects statistics of training data, in one pass.

        Args:
            loader: Gives batches: tensors, tuples with the inputs first, or dictionaries.
            images: Examples that are enough.
            loss: (network, batch) -> mean loss of the batch, for criteria that read gradients.

        Raises:
            ConfigError: The loader gives nothing, or other inputs than the network takes; or
                `images` is no such number, or `loss` no function.
        """
        is_count = isinstance(images, Integral) and not isinstance(images, bool)
        if not is_count or images < 1:
            raise ConfigError(f"images {images!r}: give a whole number, at least 1")
        if loss is not None and not callable(loss):
            raise ConfigError(f"loss is of type {type(loss).__name__}: give loss(net, batch)")
        examples = read_examples(loader, self.inputs, images)
        kinds = {"inputs"} if loss is None else {"inputs", "gates"}
        model = copy.deepcopy(self.model).cpu().eval()
        self._statistics = collect_statistics(
            model, self.plan, examples.batches, seed=0, kinds=kinds, loss=loss or classify
        )
        self._calibration = examples
        return self

    def build(
        self,
        keep_counts: Sequence[int] | NDArray[np.int64],
        criterion: str = "l1",
        *,
        recover: Recover = False,
    ) -> nn.Module:
        """An independent small network that keeps the best channels.

        Args:
            keep_counts: (G,) channels that stay in each group.
            criterion: What ranks the channels. All but those of the weights need `calibrate`, and
                `taylor` and `group_fisher` its loss.
            recover: How the cut network is repaired, without training; it needs `calibrate`. `bn`
                re-estimates BN statistics, `compensate` solves least squares for every layer
                (CaP), and `layers`, or True, fits layer after layer to the network cut so far.

        Raises:
            ConfigError: Another number of groups, a count outside 1 ... C of its group, or a
                criterion or repair that needs what was not collected.
        """
        if not isinstance(criterion, str):
            raise ConfigError(
                f"criterion is of type {type(criterion).__name__}: give its name, such as l1, or "
                "package.module:function"
            )
        counts = self._check_counts(keep_counts)
        if counts.ndim != 1:
            raise ConfigError(f"keep counts of shape {counts.shape}: give one for each group")
        if recover and self._calibration is None:
            raise ConfigError("recover needs statistics of training data: call calibrate first")
        tensors = all_tensors(self.model)
        at_hand = {name: tensor.cpu() for name, tensor in tensors.items()}  # as criteria take them
        orders = rank_channels(criterion, self.plan, at_hand, self._statistics, seed=0)
        if recover:
            small = self._recover(counts.tolist(), orders, "layers" if recover is True else recover)
        else:
            ordered = reorder_weights(self.plan, tensors, orders)
            cut = Cutter(self.plan)(ordered, counts.tolist())
            small = build_subnet(self.model, ordered | cut)
        self._built[small] = counts.tolist(), orders, criterion
        return small

    def _recover(self, counts: list[int], orders: Orders, recovery: str) -> nn.Module:
        if recovery not in ("bn", "compensate", "layers"):
            raise ConfigError(f"recover {recovery!r}: choose bn, compensate or layers")
        assert self._calibration is not None
        model = copy.deepcopy(self.model).cpu().eval()
        prepared = prepare(
            model,
            self.plan,
            self._calibration,
            self._statistics,
            criterion="",
            recovery="bn" if recovery == "bn" else "compensate",
            seed=0,
            orders=orders,
        )
        network = CutNetwork(prepared, "bn" if recovery == "bn" else "compensate")
        tensors = network.cut(counts)
        if recovery == "layers":
            inputs = inputs_together(self._calibration)
            tensors = recover_sequentially(
                model, self.plan, tensors, orders, counts, inputs, seed=0
            )
        device = find_device(self.model)
        return build_subnet(model, {**network.tensors, **tensors}).to(device)

    def save(self, net: nn.Module, folder: str | Path) -> Path:
        """Writes a network that `build` made as a subnet folder, as a search writes it.

        `load_subnet(folder, model=...)` with the whole network reads it, and `export(folder,
        format, model=...)` exports it.

        Raises:
            ConfigError: `build` did not make it.
            ArtifactError: The folder exists, or cannot be written.
        """
        if net not in self._built:
            raise ConfigError("save takes a network that build of this analysis has made")
        counts, orders, criterion = self._built[net]
        path = Path(folder)
        check_new(path, "delete it", "name another folder")
        kept = int(self.plan.macs(counts)) / self.budget.total
        description = {
            "model": f"{GIVEN}{type(self.model).__name__}",
            "task": OBJECT,
            "input_shape": list(self.plan.input_shape),
            **describe_inputs(self.inputs),
            "base_sha256": hash_weights({n: t.cpu() for n, t in self.model.state_dict().items()}),
            "cost": "macs",
            "rate": kept,
            "cost_kept": kept,
            "keep_counts": counts,
            "macs": int(self.plan.macs(counts)),
            "params": int(self.plan.params(counts)),
            "criterion": criterion,
            "groups": describe_kept(self.plan, orders, counts),
        }
        save_subnet(path, net, description)
        return path

    def _check_counts(self, keep_counts: ArrayLike) -> NDArray[np.int64]:
        try:
            counts = np.asarray(keep_counts)
        except ValueError as error:  # lists of unequal lengths
            raise ConfigError("keep counts: give one whole number for each group") from error
        if counts.shape[-1:] != (len(self.groups),):
            raise ConfigError(
                f"keep counts of shape {counts.shape}: the network has {len(self.groups)} channel "
                "groups, give one for each"
            )
        if counts.dtype.kind not in "iu":
            raise ConfigError(f"keep counts of type {counts.dtype}: give whole numbers")
        wrong = np.argwhere((counts < 1) | (counts > self.plan.cost_model.num_channels))
        if len(wrong):
            group = self.groups[wrong[0][-1]]
            raise ConfigError(
                f"keep count {counts[tuple(wrong[0])]} of group {group.name}: it must be from 1 to "
                f"{group.num_channels}"
            )
        return counts.astype(np.int64)


def analyze(model: nn.Module, example_inputs: Inputs, *, floor: float = 0.1) -> Analysis:
    """Finds the channel groups of a network.

    Args:
        model: Any CNN that runs on `example_inputs`; it is not changed. On another device than the
            CPU, a copy of it is analysed on the CPU, where an answer is the same twice.
        example_inputs: What it is called with: a tensor (1, C, H, W), of one or three dimensions
            instead of H and W as well, a tuple of tensors, or a dictionary of them by argument.
        floor: Smallest share of a group's channels that is kept, in (0, 1].

    Raises:
        ConfigError: No such input, or no such floor.
        UnsupportedModelError: It does not run, or nothing in it can be cut.
    """
    if not isinstance(floor, Real) or not 0 < floor <= 1:
        raise ConfigError(f"floor {floor}: it must be above 0 and at most 1")
    model = check_network(model)  # without the wrapper of torch.compile
    inputs = check_inputs(example_inputs)
    plan = make_plan(model, inputs)
    budget = make_budget(plan, "macs", PruningConfig(floor=floor))
    return Analysis(model, plan, budget, inputs)


@dataclass(frozen=True)
class Inspection:
    """What `cacp-ray inspect` prints.

    Attributes:
        name: Name of the network, or the subnet folder with the network it was cut from.
        about: Input and outputs of the network.
        analysis: Analysis of the network at its present widths.
        base_channels: Channels of a subnet's groups before the cut, by name; else empty.
    """

    name: str
    about: str
    analysis: Analysis
    base_channels: dict[str, int]


def inspect_model(
    name: str,
    *,
    side: int | None = None,
    input_shape: Sequence[int] | None = None,
    num_classes: int | None = None,
) -> Inspection:
    """Analyses a network by name, or a subnet folder at its own widths.

    Args:
        name: A model name (`cacp_ray.models.factory`) or a folder with subnet.json.
        side: Height and width of the input; by default what the network is made for.
        input_shape: Instead of `side`, the whole shape of one input without its batch: channels,
            and one to three sizes.
        num_classes: Outputs of the classifier; by default 1000 for torchvision and timm, else 10.

    Raises:
        CacpError: No such network or folder, no such shape, or nothing in it can be cut.
    """
    if side is not None and input_shape is not None:
        raise ConfigError("--side and --input-shape both say how large an input is: give one")
    if input_shape is not None:
        _check_shape(input_shape)
    folder = Path(name)
    is_path = name not in CIFAR_MODELS and ":" not in name and ("/" in name or folder.is_dir())
    base_channels: dict[str, int] = {}
    if is_path or (folder / "subnet.json").exists():
        if num_classes is not None:
            raise ConfigError(f"{name} has its own number of classes: leave --num-classes out")
        is_finetuned = (folder / "finetuned.safetensors").exists()
        needed = ("input_shape", "groups", "rate")
        description = read_description(folder, *needed, is_finetuned=is_finetuned)
        model = load_subnet(folder, finetuned=is_finetuned, trust=True)
        arguments = read_arguments(description)
        num_classes = description.get("num_classes")
        base_channels = {group["name"]: group["num_channels"] for group in description["groups"]}
        name = f"{name} ({description['model']} at rate {format_rate(description['rate'])})"
    else:
        num_classes = default_num_classes(name) if num_classes is None else num_classes
        model = build_model(name, num_classes).eval()
        if input_shape is None:
            shape = default_input_shape(name, model)
            channels = find_channels(model, torch.zeros(1, *shape))
            input_shape = (channels or shape[0], *shape[1:])
        arguments = (Argument(None, tuple(input_shape)),)
    if arguments[1:] and (side, input_shape) != (None, None):
        raise ConfigError(f"{name} takes {len(arguments)} inputs: leave the size of one out")
    if side is not None:
        arguments = (Argument(None, (*(arguments[0].shape or ())[:1], side, side)),)
    elif input_shape is not None:
        arguments = (Argument(None, tuple(input_shape)),)
    inputs = make_inputs(arguments, 1, torch.Generator().manual_seed(0))
    shapes = ["x".join(map(str, tensor.shape[1:])) for tensor in tensors_of(inputs)]
    classes = "" if num_classes is None else f", {num_classes} classes"
    about = f"input {' and '.join(shapes)}{classes}"
    return Inspection(name, about, analyze(model, inputs), base_channels)


def _check_shape(shape: Sequence[int]) -> None:
    """Refuses what is no shape of an input.

    Raises:
        ConfigError: The shape has another number of entries, or too many values.
    """
    text = ",".join(map(str, shape))
    if not 2 <= len(shape) <= 4:
        raise ConfigError(
            f"--input-shape {text}: give channels and one to three sizes, such as 3,480,640"
        )
    if math.prod(shape) > MAX_INPUT:
        raise ConfigError(
            f"--input-shape {text}: {math.prod(shape):,} values; give at most {MAX_INPUT:,}"
        )
