"""Which channels live where: labels are pushed through one forward pass of the network.

Every tensor carries an integer label an element. Convolutions and linear layers make new labels,
one an output channel; element-wise operations unite the labels of their operands; data movement
(view, cat, flatten ...) is replayed on the labels themselves. Labels that are united are channels
that must be kept or dropped together. What an operation does to channels is not always known: its
labels are then FROZEN, with the reason, and those channels stay whole.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.labels import FROZEN, NEUTRAL, LabelSets, compact

aten = torch.ops.aten


@dataclass(frozen=True)
class LayerCall:
    """One use of a convolution or linear layer.

    Attributes:
        weight: Name of its weight.
        out_labels: (C_out,).
        in_labels: (C_in,) labels of the weight's second dimension; None for depthwise.
        positions: Output positions of one input (H * W; rows of a linear layer's input).
        height: Rows of the output, 1 for linear.
        width: Columns of the output.
        stride: Of a convolution, 1 for linear.
        kernel: Height of the kernel, 1 for linear.
        taps: Kernel height * width, 1 for linear.
    """

    weight: str
    out_labels: Tensor
    in_labels: Tensor | None
    positions: int
    height: int
    width: int
    stride: int
    kernel: int
    taps: int


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        sets: United labels.
        calls: Uses of weights, in the order of the forward pass.
        dims: Labels of each sliced dimension of a parameter or buffer: (name, dim) -> (size,).
        batch_norms: Convolution weight -> prefix of the BN that alone takes its output.
    """

    sets: LabelSets = field(default_factory=LabelSets)
    calls: list[LayerCall] = field(default_factory=list)
    dims: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)


def trace(model: nn.Module, example_input: Tensor) -> Trace:
    """Runs `model` once in evaluation mode on (1, C, H, W) and follows its channels.

    Raises:
        UnsupportedModelError: The forward pass fails, or the output is no tensor.
    """
    was_training = model.training
    model.eval()
    example_input = example_input.contiguous(memory_format=torch.contiguous_format)
    mode = _LabelMode(model)
    mode.put(example_input, torch.full(example_input.shape, FROZEN))
    try:
        with torch.no_grad(), mode:
            output = model(example_input)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"the network does not run on an input of shape {tuple(example_input.shape)} "
            f"({reason}): check the input size"
        ) from error
    finally:
        model.train(was_training)
    outputs = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if not outputs:
        raise UnsupportedModelError(f"the network returns {type(output).__name__}, not tensors")
    for tensor in outputs:
        mode.trace.sets.freeze(mode.get(tensor), "output of the network")
    mode.finish()
    return mode.trace


MOVES = {
    aten.view, aten._unsafe_view, aten.reshape, aten.permute, aten.transpose, aten.t, aten.expand,
    aten.squeeze, aten.unsqueeze, aten.slice, aten.select, aten.split, aten.split_with_sizes,
    aten.cat, aten.stack, aten.clone, aten.alias, aten.detach, aten.unbind, aten.repeat,
    aten.roll, aten.flip, aten.pixel_shuffle, aten.pixel_unshuffle, aten.channel_shuffle,
    aten.view_as_real, aten.contiguous, aten.constant_pad_nd, aten.as_strided_,
}  # fmt: skip
POINTWISE = {
    aten.hardswish_, aten.hardsigmoid_, aten.hardtanh_, aten.hardtanh, aten.leaky_relu_, aten.elu_,
    aten.silu_, aten.mish_, aten.celu_, aten.native_dropout, aten._to_copy, aten.relu6,
    aten.copy_, aten.clamp_, aten.relu_, aten.sigmoid_, aten.add_, aten.mul_,
}  # fmt: skip
SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}
PER_CHANNEL = {  # output channel i is made of input channel i alone
    aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.max_pool2d,
    aten.adaptive_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d,
}  # fmt: skip
REDUCTIONS = {aten.mean, aten.sum, aten.amax}
BATCH_NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
}  # fmt: skip


class _LabelMode(TorchDispatchMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.trace = Trace()
        self._labels: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # keeps ids unique while the pass runs
        self._weights: dict[int, tuple[str, bool]] = {}  # id -> (name, transposed)
        self._elements: dict[str, Tensor] = {}  # parameters used element by element
        self._made_by: dict[int, str] = {}
        self._users: dict[str, list[str]] = defaultdict(list)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._weights[id(tensor)] = (name, False)
            self._kept.append(tensor)

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        self._labels[id(tensor)] = labels
        self._kept.append(tensor)

    def get(self, tensor: Tensor) -> Tensor:
        if id(tensor) in self._labels:
            return self._labels[id(tensor)]
        if id(tensor) in self._weights:
            name, transposed = self._weights[id(tensor)]
            if name not in self._elements:
                shape = tensor.t().shape if transposed else tensor.shape
                labels = self.trace.sets.new(tensor.numel()).reshape(shape)
                self._elements[name] = labels
            return self._elements[name].t() if transposed else self._elements[name]
        return torch.full(tensor.shape, NEUTRAL)

    def finish(self) -> None:
        """Settles what only the whole pass can tell: lone BN layers, element-wise parameters."""
        sets = self.trace.sets
        norms = self.trace.batch_norms
        self.trace.batch_norms = {w: norm for w, norm in norms.items() if len(self._users[w]) == 1}
        for name, labels in self._elements.items():
            roots = torch.from_numpy(sets.find(labels.numpy()))
            for dim in range(roots.ndim):
                others = [d for d in range(roots.ndim) if d != dim]
                line = roots.permute(dim, *others).reshape(roots.shape[dim], -1)
                if roots.shape[dim] > 1 and bool((line == line[:, :1]).all()):
                    self._bind(name, dim, line[:, 0])
                    break
            else:
                if roots.numel() > 1:
                    sets.freeze(roots, f"parameter {name} mixes them")

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = func.overloadpacket
        tensors = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        for tensor in tensors:
            if id(tensor) in self._made_by:
                self._users[self._made_by[id(tensor)]].append(str(packet))
        if packet is aten.convolution:
            self._convolution(out, *args)
        elif packet is aten.addmm:
            self._linear(out, args[1], args[2], args[0])
        elif packet is aten.mm:
            self._linear(out, args[0], args[1], None)
        elif packet in BATCH_NORMS:
            self._batch_norm(out, args)
        elif packet in (aten.t, aten.detach, aten.alias) and id(args[0]) in self._weights:
            name, transposed = self._weights[id(args[0])]
            self._weights[id(out)] = (name, transposed != (packet is aten.t))
            self._kept.append(out)
        elif packet in MOVES:
            self._move(func, out, args, kwargs)
        elif packet in PER_CHANNEL:
            self._per_channel(out, args[0])
        elif packet in REDUCTIONS and len(args) > 1:
            self._reduce(out, args, kwargs)
        elif packet in POINTWISE or torch.Tag.pointwise in func.tags:
            self._pointwise(out, tensors, is_sum=packet in SUMS)
        else:
            self._unsupported(out, tensors, str(packet).removeprefix("aten."))
        return out

    def _bind(self, name: str, dim: int, labels: Tensor) -> None:
        """Says that position i of a dimension holds channel labels[i]; again: unites both."""
        known = self.trace.dims.get((name, dim))
        if known is not None:
            self.trace.sets.unite(known, labels)
        else:
            self.trace.dims[name, dim] = labels.clone()

    def _channels(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(C,) labels along `dim`; channels whose label changes along other dimensions freeze."""
        labels = compact(self.get(tensor)).movedim(dim, 0)
        labels = labels.expand(tensor.shape[dim], *labels.shape[1:]).flatten(1)
        if labels.shape[1] > 1:
            # Padding is neutral, so it may stand beside channels.
            first = labels.amax(1)
            bad = ((labels != first[:, None]) & (labels != NEUTRAL)).any(1)
            if bool(bad.any()):
                self.trace.sets.freeze(labels[bad], "channels of several layers share a place")
            return first
        return labels[:, 0]

    def _weight_name(self, weight: Tensor) -> str | None:
        return self._weights.get(id(weight), (None, False))[0]

    def _convolution(
        self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int],
        padding: Any, dilation: Any, transposed: bool, output_padding: Any, groups: int,
    ) -> None:  # fmt: skip
        name = self._weight_name(weight)
        if name is None or transposed or x.ndim != 4:
            tensors = [t for t in (x, weight, bias) if t is not None]
            self._unsupported(out, tensors, "a convolution with a computed weight or transposed")
            return
        inputs = self._channels(x)
        depthwise = groups == x.shape[1] == out.shape[1] and groups > 1
        if depthwise:
            outputs = inputs
        else:
            outputs = self.trace.sets.new(out.shape[1])
            if groups > 1:
                self.trace.sets.freeze(inputs, f"input of the grouped convolution {name}")
                self.trace.sets.freeze(outputs, f"output of the grouped convolution {name}")
                inputs = torch.full((weight.shape[1],), FROZEN)
        window = (weight.shape[2], weight[0, 0].numel())
        self._layer(name, bias, outputs, None if depthwise else inputs, out, stride[0], window)
        self.put(out, outputs.view(1, -1, 1, 1).expand(out.shape))

    def _linear(self, out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        name = self._weight_name(weight)
        if name is None or not self._weights[id(weight)][1]:
            self._unsupported(
                out, [t for t in (x, weight, bias) if t is not None], "matrix product"
            )
            return
        outputs = self.trace.sets.new(out.shape[1])
        self._layer(name, bias, outputs, self._channels(x), out, 1, (1, 1))
        self.put(out, outputs.view(1, -1).expand(out.shape))

    def _layer(
        self, name: str, bias: Tensor | None, outputs: Tensor, inputs: Tensor | None, out: Tensor,
        stride: int, window: tuple[int, int],
    ) -> None:  # fmt: skip
        self._bind(name, 0, outputs)
        outputs = self.trace.dims[name, 0]
        if inputs is not None:
            self._bind(name, 1, inputs)
        if bias is not None and (bias_name := self._weight_name(bias)):
            self._bind(bias_name, 0, outputs)
        height, width = (out.shape[2], out.shape[3]) if out.ndim == 4 else (1, 1)
        positions = height * width if out.ndim == 4 else out.shape[0]
        self.trace.calls.append(
            LayerCall(name, outputs, inputs, positions, height, width, stride, *window)
        )
        self._made_by[id(out)] = name

    def _batch_norm(self, out: Any, args: tuple[Any, ...]) -> None:
        x, tensors = args[0], [t for t in args[1:5] if isinstance(t, Tensor)]
        labels = self._channels(x)
        names = [name for t in tensors if (name := self._weight_name(t))]
        for name in names:
            self._bind(name, 0, labels)
        self.put(out[0], self.get(x))
        if id(x) in self._made_by and names:
            self.trace.batch_norms[self._made_by[id(x)]] = names[0].rpartition(".")[0]

    def _move(self, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        def swap(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self.get(value)
            if isinstance(value, (list, tuple)):
                return type(value)(swap(item) for item in value)
            return value

        if func.overloadpacket in (aten.view, aten._unsafe_view):
            labels: Any = self.get(args[0]).reshape(args[1])
        elif func.overloadpacket is aten.as_strided_:
            if out.shape[:2].numel() != out.numel():
                self._unsupported(out, [args[0]], "as_strided_")
                return
            labels = self.get(args[0])  # a channels_last mean rewrites strides of single pixels
        elif func.overloadpacket is aten.clone:
            labels = self.get(args[0])
        elif func.overloadpacket is aten.constant_pad_nd:
            labels = nn.functional.pad(self.get(args[0]), args[1], value=NEUTRAL)
        else:
            labels = func(*swap(args), **kwargs)
        for tensor, label in zip(*(map(_as_list, (out, labels))), strict=True):
            self.put(tensor, label)

    def _per_channel(self, out: Any, x: Tensor) -> None:
        labels = self._channels(x).view(1, -1, 1, 1)
        for tensor in _as_list(out):
            self.put(tensor, labels.expand(tensor.shape))

    def _reduce(self, out: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, dims = args[0], [d % args[0].ndim for d in _as_list(args[1])]
        keepdim = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        labels = self.get(x)
        for dim in sorted(dims, reverse=True):
            first = labels.narrow(dim, 0, 1)
            if labels.stride(dim) != 0 and not bool((labels == first).all()):
                self.trace.sets.freeze(labels, "summed over channels")
                labels = torch.full(first.shape, FROZEN)
            labels = first if keepdim else labels.select(dim, 0)
        self.put(out, labels)

    def _pointwise(self, out: Any, tensors: list[Tensor], *, is_sum: bool) -> None:
        labels = torch.tensor(NEUTRAL)
        for tensor in tensors:
            labels = self.trace.sets.unite(labels, self.get(tensor), is_sum=is_sum)
        for tensor in _as_list(out):
            if isinstance(tensor, Tensor):
                self.put(tensor, labels.expand(tensor.shape))

    def _unsupported(self, out: Any, tensors: Iterable[Tensor], what: str) -> None:
        for tensor in tensors:
            self.trace.sets.freeze(self.get(tensor), f"passes through {what}")
        for tensor in _as_list(out):
            if isinstance(tensor, Tensor):
                self.put(tensor, torch.full(tensor.shape, FROZEN if list(tensors) else NEUTRAL))


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
