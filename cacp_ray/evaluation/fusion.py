"""The network as candidates are scored: BN is folded into convolutions, what follows is fused.

A convolution of a small network is cheap; the passes over memory after it (BN, the sum with a
shortcut, the activation) are not. On CPUs, a convolution and what follows it become one call of
oneDNN, as with torch.compile. Nothing is compiled: the graph is made once from the whole network,
and a candidate only exchanges weights. On other devices BN is folded too, but sum and activation
stay calls of their own. Networks that torch.fx cannot trace, or whose graph gives other logits, are
scored as they are.
"""

import copy
import operator
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.training.metrics import find_device

# oneDNN's name of an activation, and its numbers. Only ReLU can follow a sum.
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
    "none": lambda x: x,  # pyright: ignore[reportUnknownLambdaType]
    "relu": functional.relu_,
    "hardtanh": functional.hardtanh_,
    "swish": partial(functional.silu, inplace=True),
    "hardswish": partial(functional.hardswish, inplace=True),
}
SUMS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)  # pyright: ignore


class FusedConv2d(nn.Conv2d):
    """One call for a convolution, an optional sum with a tensor, and an optional activation."""

    activation: Activation = NONE

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """Convolves x (N, C_in, H, W); `other` has the result's shape (N, C_out, H', W')."""
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
    """Names of a convolution and of the BN folded into it, and the BN's eps."""

    convolution: str
    norm: str
    eps: float


class FusedNetwork:
    """A fused copy of a network, whose weights are exchanged by the names of the original.

    Attributes:
        dtype: Dtype of weights and images from the next `load` on.
    """

    def __init__(self, graph: fx.GraphModule, folds: Sequence[Fold]) -> None:
        self.dtype = torch.float32
        self._resizable = ResizableNetwork(graph)
        self._folds = folds
        self._known = {name for name, _ in [*graph.named_parameters(), *graph.named_buffers()]}

    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The network with the original's tensors, at any sizes; valid until the next call."""
        return self._resizable.load(
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
    """A fused copy of `model`, or None where it cannot be traced; the caller checks its logits."""
    if find_device(model).type == "cpu" and not torch.backends.mkldnn.is_available():
        return None
    whole = copy.deepcopy(model).eval().requires_grad_(False)
    try:
        graph = fx.symbolic_trace(whole)
    except Exception:  # the network's own code may raise anything at a tensor without values
        return None
    modules: dict[str, Any] = dict(graph.named_modules())  # pyright: ignore[reportUnknownArgumentType]
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
        activation = NONE if user is None else _activation(user, modules)
        if user is not None and (activation == RELU or (activation != NONE and other is None)):
            fused.activation, last = activation, user
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
    """The sum that is the only user of `node`, with its other operand; else `node` and None."""
    user = _only_user(node)
    if user is None or user.op != "call_function" or user.target not in SUMS or user.kwargs:
        return node, None
    others = [operand for operand in user.args if operand is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return node, None
    return user, others[0]


def _activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation:
    key = type(modules[str(node.target)]) if node.op == "call_module" else node.target
    return ACTIVATIONS.get(key, NONE)
