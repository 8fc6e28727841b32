"""What layers, norms and matrix products do to labels, and the MACs they cost."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import flop_registry

from cacp_ray.pruning.axis import drops_groups
from cacp_ray.pruning.labels import NEUTRAL, compact, varying_dims
from cacp_ray.pruning.latency_cost import LayerShape
from cacp_ray.pruning.tracer import LayerCall, Tracer

aten = torch.ops.aten


@dataclass(frozen=True)
class Op:
    """One operation of the forward pass, after it ran."""

    func: Any
    out: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def packet(self) -> Any:
        """The operation without its overload."""
        return self.func.overloadpacket

    @cached_property
    def tensors(self) -> list[Tensor]:
        """All input tensors."""
        return [t for t in tree_flatten((self.args, self.kwargs))[0] if isinstance(t, Tensor)]

    @cached_property
    def outputs(self) -> list[Tensor]:
        """All output tensors."""
        return [t for t in tree_flatten(self.out)[0] if isinstance(t, Tensor)]

    def add_fixed_cost(self, tracer: Tracer) -> None:
        """Records MACs that no cut changes, as PyTorch counts them."""
        if self.packet in flop_registry:
            flops = flop_registry[self.packet](*self.args, **self.kwargs, out_val=self.out)
            one = torch.tensor([NEUTRAL])
            tracer.trace.calls.append(LayerCall(None, int(flops) // 2, one, None))


def use_weight(tracer: Tracer, op: Op) -> bool:
    """Follows arithmetic on a layer's weight, such as weight standardisation."""
    weights = [t for t in op.tensors if tracer.weight_of(t)]
    others = [t for t in op.tensors if not tracer.weight_of(t)]
    if len({tracer.weight_of(t) for t in weights}) > 1 or len(op.outputs) == 0:
        return False
    source = weights[0]
    name = tracer.weight_of(source)
    assert name is not None
    if op.packet in (aten.t, aten.detach, aten.alias):
        tracer.derive(op.outputs[0], source, transpose=op.packet is aten.t, is_same=True)
        return True
    num_outputs = tracer.shapes[name][0]
    for tensor in others:
        labels = tracer.get(tensor)
        if not bool((compact(labels) != NEUTRAL).any()):
            continue
        if labels.numel() != num_outputs:
            return False
        tracer.gains[name].append(labels.reshape(-1))
    if op.packet in BATCH_NORMS or op.packet in (aten.mean, aten.var_mean, aten.std, aten.var):
        tracer.standardised.add(name)
    for tensor in op.outputs:
        tracer.derive(tensor, source)
    return True


def _convolution(tracer: Tracer, op: Op) -> bool:
    x, weight, bias, stride, _, _, transposed, _, groups = op.args
    out = op.outputs[0]
    name = tracer.weight_of(weight)
    if name is None or weight.shape != tracer.shapes[name]:
        return _constant_filter(tracer, op)
    if x.shape[1] == weight.shape[0] == 1 and varying_dims(tracer.get(x)):
        tracer.sets.freeze(tracer.get(x), "a filter slides over the channels: their order counts")
    inputs = tracer.channels(x)
    places = (x if transposed else out).shape
    factor = places[0] * places[2:].numel() * weight.shape[2:].numel()
    width_in, width_out = x.shape[1] // groups, out.shape[1] // groups
    sets = tracer.sets
    mixed: Tensor | None
    if groups == 1:
        outputs = tracer.bind(name, 1 if transposed else 0, sets.new(out.shape[1]))
        mixed = tracer.bind(name, 0 if transposed else 1, inputs)
    elif drops_groups(x.shape[1], groups):  # each part of the convolution stays or goes whole
        parts = inputs if width_in == 1 else sets.unite_along(inputs.view(groups, -1), 1)
        outputs = parts.repeat_interleave(width_out)
        tracer.bind(name, 0, parts.repeat_interleave(width_in) if transposed else outputs)
        mixed, factor = None, factor * width_in
    else:  # all parts keep the same lanes
        lanes = sets.unite_along(inputs.view(groups, -1), 0)
        new = sets.new(width_out)
        outputs, mixed = new.repeat(groups), lanes
        tracer.bind(name, 0, lanes.repeat(groups) if transposed else outputs)
        tracer.bind(name, 1, new if transposed else lanes)
    _bias(tracer, bias, outputs)
    call = LayerCall(
        name, factor, outputs, mixed,
        is_mixing=groups == 1 and not transposed and x.ndim == 4
        and tracer.is_weight_itself(weight, name),
        height=out.shape[2], width=out.shape[-1], stride=stride[0], kernel=weight.shape[2],
        shape=_conv_shape(op, width_in, width_out),
    )  # fmt: skip
    tracer.add_layer(call, out)
    tracer.put(out, outputs.view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape))
    return True


def _conv_shape(op: Op, width_in: int, width_out: int) -> LayerShape | None:
    x, weight, bias, stride, padding, dilation, transposed, _, groups = op.args
    if x.ndim != 4 or transposed:
        return None
    goes_whole = groups > 1 and drops_groups(x.shape[1], groups)
    return LayerShape(
        kind="conv",
        kernel=tuple(weight.shape[2:]),
        stride=tuple(stride),
        padding=tuple(padding),
        dilation=tuple(dilation),
        groups=0 if goes_whole else groups,
        part=(width_in, width_out) if goes_whole else (1, 1),
        bias=bias is not None,
        batch_norm=False,
        height=x.shape[2],
        width=x.shape[3],
    )


def _constant_filter(tracer: Tracer, op: Op) -> bool:
    """Labels the output of a fixed filter on each channel, such as a blur."""
    x, weight, bias, _, _, _, transposed, _, groups = op.args
    out = op.outputs[0]
    labels = tracer.get(weight) if tracer.is_labelled(weight) else torch.tensor(NEUTRAL)
    is_plain = groups == x.shape[1] == out.shape[1] and bias is None and not transposed
    if not is_plain or 0 in varying_dims(labels) or tracer.weight_of(weight):
        return False
    outputs = tracer.channels(x)
    if name := tracer.name_of(weight):
        tracer.bind(name, 0, outputs)
    factor = out.shape[0] * out.shape[2:].numel() * weight.shape[2:].numel()
    tracer.add_layer(LayerCall(None, factor, outputs, None), out)
    tracer.put(out, outputs.view(1, -1, *[1] * (out.ndim - 2)).expand(out.shape))
    return True


def _linear(tracer: Tracer, op: Op) -> bool:
    bias, x, weight = op.args[:3] if op.packet is aten.addmm else (None, *op.args[:2])
    out = op.outputs[0]
    name = tracer.weight_of(weight)
    if name is None or not tracer.is_transposed(weight) or tracer.weight_of(x):
        if name is None and tracer.weight_of(x) is None and bias is None:
            return _product(tracer, op)
        return False
    outputs = tracer.bind(name, 0, tracer.sets.new(out.shape[1]))
    inputs = tracer.bind(name, 1, tracer.channels(x))
    _bias(tracer, bias, outputs)
    is_mixing = tracer.is_weight_itself(weight, name)
    one = (1, 1)
    shape = LayerShape(
        "linear", one, one, (0, 0), one, 1, one, bias is not None, False, out.shape[0], 1
    )
    call = LayerCall(name, out.shape[0], outputs, inputs, is_mixing=is_mixing, shape=shape)
    tracer.add_layer(call, out)
    tracer.put(out, outputs.view(1, -1).expand(out.shape))
    return True


def _bias(tracer: Tracer, bias: Tensor | None, outputs: Tensor) -> None:
    if bias is None:
        return
    if name := tracer.name_of(bias):
        tracer.bind(name, 0, outputs)
    else:
        tracer.sets.unite(tracer.get(bias), outputs)


def _product(tracer: Tracer, op: Op) -> bool:
    """Labels a product of activations (..., I, K) x (..., K, J): channels on K must match."""
    first, second = (tracer.get(tensor) for tensor in op.args[:2])
    out, last = op.outputs[0], first.ndim - 1
    rows, columns = varying_dims(first), varying_dims(second)
    batch = set(range(last - 1))
    if last in rows or last - 1 in columns:  # a sum over channels: both sides have the same
        is_matched = set(rows) - batch == {last} and set(columns) - batch == {last - 1}
        if not is_matched:
            return False
        tracer.sets.unite(first.narrow(last - 1, 0, 1), second.narrow(last, 0, 1).mT)
        nothing = torch.tensor(NEUTRAL).expand(out.shape)
        return _multiplied(tracer, op, first, rows, nothing)
    left, right = first.narrow(last, 0, 1), second.narrow(last - 1, 0, 1)
    if rows and columns:
        if set(rows) & batch or set(columns) & batch:
            return False
        tracer.sets.freeze(left, "a product of two sets of channels")
        tracer.sets.freeze(right, "a product of two sets of channels")
        return False
    labels = left if rows else right
    source, along = (first, rows) if rows else (second, columns)
    return _multiplied(tracer, op, source, along, labels.expand(out.shape))


def _multiplied(tracer: Tracer, op: Op, source: Tensor, along: list[int], labels: Tensor) -> bool:
    """Records a product whose cost follows the channels of `source` along some dimensions."""
    flops = flop_registry[op.packet](*op.args, **op.kwargs, out_val=op.out)
    line = source
    for dim in reversed(range(source.ndim)):
        if dim not in along:
            line = line.select(dim, 0)
    line = line.reshape(-1)
    tracer.add_layer(LayerCall(None, int(flops) // 2 // len(line), line, None), op.outputs[0])
    tracer.put(op.outputs[0], labels)
    return True


BATCH_NORMS = {
    aten.native_batch_norm, aten._native_batch_norm_legit_no_training, aten.cudnn_batch_norm,
    aten._native_batch_norm_legit,
}  # fmt: skip


def _norm_parameters(tracer: Tracer, tensors: Iterable[Any], labels: Tensor) -> list[str]:
    """Labels the parameters and buffers of a norm; returns the names they have."""
    names: list[str] = []
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            continue
        if name := tracer.name_of(tensor):
            tracer.bind(name, 0, labels)
            names.append(name)
        else:
            tracer.sets.unite(tracer.get(tensor), labels)
    return names


def _batch_norm(tracer: Tracer, op: Op) -> bool:
    x = op.args[0]
    labels = tracer.channels(x)
    names = _norm_parameters(tracer, op.args[1:5], labels)
    tracer.put(op.outputs[0], tracer.get(x))
    if any(name.endswith("running_mean") for name in names):
        tracer.add_batch_norm(x, names[0].rpartition(".")[0])
    return True


def _layer_norm(tracer: Tracer, op: Op) -> bool:
    x, shape = op.args[0], op.args[1]
    labels = tracer.get(x)
    if len(shape) == 1 and x.ndim - 1 in varying_dims(labels):
        line = tracer.channels(x, x.ndim - 1)
        _norm_parameters(tracer, op.args[2:4], line)
        tracer.sets.mark_normalised(line)
    elif set(varying_dims(labels)) & set(range(x.ndim - len(shape), x.ndim)):
        return False
    tracer.put(op.outputs[0], labels)
    return True


def _group_norm(tracer: Tracer, op: Op) -> bool:
    """Makes parts that are normalised together stay or go whole, or all keep the same lanes."""
    x, weight, bias, _, _, _, groups, _ = op.args
    labels = tracer.channels(x)
    if groups > 1 and drops_groups(x.shape[1], groups):
        if weight is None:
            return False  # nothing tells the layer its new number of groups
        tracer.sets.unite_along(labels.view(groups, -1), 1)
    else:
        tracer.sets.unite_along(labels.view(groups, -1), 0)
        tracer.sets.mark_normalised(labels)
    _norm_parameters(tracer, (weight, bias), labels)
    tracer.put(op.outputs[0], tracer.get(x))
    return True


TAKES_WEIGHTS = {aten.convolution, aten.addmm, aten.mm}
LAYER_RULES = {
    aten.convolution: _convolution,
    aten.addmm: _linear,
    aten.mm: _linear,
    aten.bmm: _product,
    **dict.fromkeys(BATCH_NORMS, _batch_norm),
    aten.native_layer_norm: _layer_norm,
    aten._fused_rms_norm: _layer_norm,
    aten.native_group_norm: _group_norm,
}
