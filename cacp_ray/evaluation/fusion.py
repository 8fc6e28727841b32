"""The network as candidates are scored: BN folded into convolutions, what follows fused with them.

A convolution of a small network is cheap, and the passes over memory after it are not: BN, the sum
with a shortcut, the activation. Here a convolution and what follows it are one call of oneDNN, as
torch.compile makes them on CPUs, but nothing is compiled: the graph is made once from the whole
network, and a candidate only exchanges weights. Networks that torch.fx cannot trace, or whose graph
gives other logits, are scored as they are. On other devices BN is folded all the same, and the rest
of a call is made of single ones.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cacp_ray.pruning.surgery import Skeleton
from cacp_ray.training.metrics import find_device

# Activation -> oneDNN's name for it and its numbers. Only ReLU can follow a sum.
Activation = tuple[str, tuple[float, ...]]
NONE: Activation = ("none", ())
RELU: Activation = ("relu", ())
ACTIVATIONS: dict[Any, Activation] = {
    **dict.fromkeys((nn.ReLU, functional.relu, torch.relu, torch.relu_, "relu", "relu_"), RELU),
    **dict.fromkeys((nn.ReLU6, functional.relu6), ("hardtanh", (0.0, 6.0))),
    **dict.fromkeys((nn.SiLU, functional.silu), ("swish", ())),
    **dict.fromkeys((nn.Hardswish, functional.hardswish), ("hardswish", ())),
}
APPLY: dict[str, Callable[..., Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu_,
    "hardtanh": functional.hardtanh_,
    "swish": lambda x: functional.silu(x, inplace=True),
    "hardswish": lambda x: functional.hardswish(x, inplace=True),
}
SUMS = (operator.add, operator.iadd, torch.add)


class FusedConv2d(nn.Conv2d):
    """A convolution, perhaps plus another tensor, then perhaps an activation: one call."""

    activation: Activation = NONE

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """(N, C_in, H, W), and `other` of the result's shape -> (N, C_out, H', W')."""
        name, numbers = self.activation
        if x.device.type != "cpu":
            y = super().forward(x)
            return APPLY[name](y if other is None else y.add_(other), *numbers)
        call = torch.ops.mkldnn._convolution_pointwise
        shape = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        if other is None:
            return call(x, self.weight, self.bias, *shape, name, list(numbers), "")
        unary = None if name == "none" else name
        return call.binary(x, other, self.weight, self.bias, *shape, "add", 1.0, unary, [], None)


@dataclass(frozen=True)
class Fold:
    """A convolution by name and the BN that it takes in, with the latter's eps."""

    convolution: str
    norm: str
    eps: float


class FusedNetwork:
    """A fused copy of a network, whose weights are exchanged by the names of the original.

    Attributes:
        dtype: Of its tensors from the next `load` on; networks take images of it.
    """

    def __init__(self, graph: fx.GraphModule, folds: Sequence[Fold]) -> None:
        self.dtype = torch.float32
        self._skeleton = Skeleton(graph)
        self._folds = folds
        self._known = {name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]}

    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The network with all the original's tensors, of any sizes; valid until the next call."""
        return self._skeleton.load(
            {
                name: tensor.to(self.dtype) if tensor.is_floating_point() else tensor
                for name, tensor in self._fold(tensors).items()
                if name in self._known
            }
        )

    def _fold(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = dict(tensors)
        for fold in self._folds:
            weight = tensors[f"{fold.convolution}.weight"]
            mean = tensors[f"{fold.norm}.running_mean"]
            factor = (tensors[f"{fold.norm}.running_var"] + fold.eps).rsqrt()
            factor = factor * tensors.get(f"{fold.norm}.weight", 1.0)
            bias = tensors.get(f"{fold.convolution}.bias", 0.0)
            shift = (bias - mean) * factor + tensors.get(f"{fold.norm}.bias", 0.0)
            result[f"{fold.convolution}.weight"] = weight * factor.view(-1, 1, 1, 1)
            result[f"{fold.convolution}.bias"] = shift
        return result


def fuse(model: nn.Module) -> FusedNetwork | None:
    """A fused copy of `model`, None where it cannot be traced. Checking its logits is the caller's.

    Args:
        model: Left as it is.
    """
    if find_device(model).type == "cpu" and not torch.backends.mkldnn.is_available():
        return None
    whole = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        graph = fx.symbolic_trace(whole)
    except Exception:  # whatever the network's own code raises at a tensor without values
        return None
    modules = dict(graph.named_modules())
    calls = Counter(node.target for node in graph.graph.nodes)
    folds: list[Fold] = []
    for node in list(graph.graph.nodes):
        convolution = modules.get(str(node.target)) if node.op == "call_module" else None
        if not _is_plain(convolution) or calls[node.target] > 1 or len(node.args) != 1:
            continue
        name, last = str(node.target), node
        fused = FusedConv2d.__new__(FusedConv2d)
        fused.__dict__.update(vars(convolution))
        user = _only_user(last)
        if user is not None and _is_foldable(norm := modules.get(str(user.target))):
            folds.append(Fold(name, str(user.target), norm.eps))
            zeros = torch.zeros(fused.out_channels, device=fused.weight.device)
            fused.bias = nn.Parameter(zeros, requires_grad=False)
            last = user
        last, other = _with_sum(last)
        user = _only_user(last)
        found = NONE if user is None else _activation(user, modules)
        if user is not None and (found == RELU or (found != NONE and other is None)):
            fused.activation, last = found, user
        graph.set_submodule(name, fused)
        with graph.graph.inserting_before(last):
            arguments = (node.args[0],) if other is None else (node.args[0], other)
            last.replace_all_uses_with(graph.graph.call_module(name, arguments))
        graph.graph.eliminate_dead_code()
    graph.delete_all_unused_submodules()
    graph.recompile()
    return FusedNetwork(graph, folds)


def _is_plain(module: nn.Module | None) -> bool:
    return (
        type(module) is nn.Conv2d
        and module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
    )


def _is_foldable(module: nn.Module | None) -> TypeGuard[nn.BatchNorm2d]:
    return type(module) is nn.BatchNorm2d and module.running_mean is not None


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _with_sum(node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The sum that alone takes `node` and its other operand, else `node` itself."""
    user = _only_user(node)
    if user is None or user.op != "call_function" or user.target not in SUMS or user.kwargs:
        return node, None
    others = [each for each in user.args if each is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return node, None
    return user, others[0]


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation:
    key = type(modules[str(node.target)]) if node.op == "call_module" else node.target
    return ACTIVATIONS.get(key, NONE)
