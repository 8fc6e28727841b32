"""What data movement, element-wise operations and reductions do to labels.

`layer_rules` has layers, norms and matrix products. An operation without a rule freezes what passes
through it.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from cacp_ray.errors import is_out_of_memory
from cacp_ray.pruning.flops import is_uncounted
from cacp_ray.pruning.labels import FROZEN, NEUTRAL, compact, split_dim, varying_dims
from cacp_ray.pruning.layer_rules import LAYER_RULES, TAKES_WEIGHTS, Op, use_weight
from cacp_ray.pruning.torch_types import broadcast
from cacp_ray.pruning.tracer import Tracer

aten = torch.ops.aten
logger = logging.getLogger(__name__)
Rule = Callable[[Tracer, Op], bool]

MOVES = {
    aten.permute, aten.transpose, aten.t, aten.expand, aten.squeeze, aten.unsqueeze, aten.cat,
    aten.stack, aten.clone, aten.alias, aten.detach, aten.repeat, aten.flip,
    aten.pixel_shuffle, aten.pixel_unshuffle, aten.contiguous, aten.unbind,
}  # fmt: skip
VIEWS = {aten.view, aten._unsafe_view, aten.reshape}
POINTWISE = {
    aten.hardswish_, aten.hardsigmoid_, aten.hardtanh_, aten.hardtanh, aten.leaky_relu_, aten.elu_,
    aten.silu_, aten.mish_, aten.celu_, aten._to_copy, aten.relu6, aten.clamp_, aten.relu_,
    aten.sigmoid_, aten.add_, aten.mul_, aten.sub_, aten.div_, aten._prelu_kernel, aten.hardswish,
    aten.hardsigmoid, aten.threshold_, aten.rrelu_with_noise, aten.rrelu_with_noise_,
    aten.bernoulli, aten.bernoulli_,
}  # fmt: skip
SUMS = {aten.add, aten.add_, aten.sub, aten.sub_}
PER_CHANNEL = {  # each output channel is made of the same input channel alone -> sides of an image
    **dict.fromkeys((
        aten.upsample_nearest1d, aten.upsample_linear1d, aten._upsample_nearest_exact1d,
        aten.reflection_pad1d, aten.replication_pad1d,
    ), 1),
    **dict.fromkeys((
        aten.max_pool2d_with_indices, aten.avg_pool2d, aten._adaptive_avg_pool2d, aten.max_pool2d,
        aten.adaptive_max_pool2d, aten.upsample_nearest2d, aten.upsample_bilinear2d,
        aten.upsample_bicubic2d, aten._upsample_nearest_exact2d, aten.reflection_pad2d,
        aten.replication_pad2d, aten._upsample_bilinear2d_aa,
    ), 2),
    **dict.fromkeys((
        aten.max_pool3d_with_indices, aten.avg_pool3d, aten._adaptive_avg_pool3d,
        aten.adaptive_max_pool3d, aten.upsample_nearest3d, aten.upsample_trilinear3d,
        aten._upsample_nearest_exact3d, aten.reflection_pad3d, aten.replication_pad3d,
    ), 3),
}  # fmt: skip
REDUCTIONS = {  # position of the argument that names the dimensions
    aten.mean: 1, aten.sum: 1, aten.amax: 1, aten.amin: 1, aten.var_mean: 1, aten.var: 1,
    aten.std: 1, aten.max: 1, aten.min: 1, aten.logsumexp: 1, aten.linalg_vector_norm: 2,
}  # fmt: skip
MAKERS = {
    aten.zeros_like, aten.ones_like, aten.empty_like, aten.full_like, aten.new_zeros,
    aten.new_empty, aten.new_full, aten.new_ones, aten.rand_like, aten.randn_like,
}  # fmt: skip


def apply_rule(
    tracer: Tracer, func: Any, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Labels the outputs of an operation."""
    op = Op(func, out, args, kwargs)
    tracer.use(op.tensors)
    for tensor in op.outputs:
        for source in op.tensors:
            if tensor is not source and _shares_memory(tensor, source):
                tracer.set_base(tensor, source)
    if not func._schema.is_mutable or not tracer.has_views(args[0]):
        _label(tracer, op)
        return
    target, before = args[0], tracer.get(args[0])
    _label(tracer, op)
    after = tracer.get(target)
    if not torch.equal(tracer.canonical(before), after) and not tracer.write_through(target):
        tracer.freeze_all([target, *op.tensors], "written in place through a view")


def _label(tracer: Tracer, op: Op) -> None:
    """Labels the outputs by rule, or freezes all channels where no rule can."""
    try:
        rule = _rule_of(tracer, op)
        is_known = rule is not None and rule(tracer, op)
    except Exception as error:  # the rule does not foresee this form of the operation
        if is_out_of_memory(error):
            raise
        logger.debug("%s: %s", op.func, error)
        is_known = False
    if not is_known:
        _freeze(tracer, op)


def _rule_of(tracer: Tracer, op: Op) -> Rule | None:
    if op.packet not in TAKES_WEIGHTS and any(tracer.weight_of(t) for t in op.tensors):
        return use_weight
    other = _pointwise if torch.Tag.pointwise in op.func.tags else None
    return LAYER_RULES.get(op.packet) or RULES.get(op.packet, other)


def _shares_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr() != 0


def _freeze(tracer: Tracer, op: Op) -> None:
    name = str(op.packet).removeprefix("aten.")
    reason = f"passes through {name}"
    if is_uncounted(op.packet):
        tracer.trace.uncounted[name] += 1
        reason += ", whose work is not counted"
    tracer.freeze_all(op.tensors, reason)
    for tensor in op.outputs:
        tracer.put(tensor, torch.tensor(FROZEN if op.tensors else NEUTRAL).expand(tensor.shape))
    op.add_fixed_cost(tracer)


def _make(tracer: Tracer, op: Op) -> bool:
    for tensor in op.outputs:
        tracer.put(tensor, torch.tensor(NEUTRAL).expand(tensor.shape))
    return True


def _move(tracer: Tracer, op: Op) -> bool:
    """Replays data movement on the labels."""
    source = op.tensors[0]
    if op.packet in (aten.detach, aten.alias) and tracer.name_of(source):
        tracer.alias(op.outputs[0], source)
        return True
    if op.packet is aten.clone:
        labels: Any = tracer.get(source)
    elif op.packet in VIEWS:
        if isinstance(op.args[1], torch.dtype):
            return False
        labels = tracer.get(source).reshape(op.args[1])
        _tie_parts(tracer, tracer.get(source), labels, op.args[1])
    else:
        labels = op.func(*tree_map_only(Tensor, tracer.get, op.args), **op.kwargs)
    for tensor, label in zip(op.outputs, tree_flatten(labels)[0], strict=True):
        tracer.put(tensor, label)
    return True


def _tie_parts(tracer: Tracer, before: Tensor, after: Tensor, sizes: Sequence[int]) -> None:
    """Unites the parts of channels viewed as parts x lanes: the view fits if all keep one set.

    Where the code leaves the number of parts open, as `view(n, -1, 8, 8)` does with a linear
    layer's outputs, parts stay or go whole.
    """
    varying, old = varying_dims(after), varying_dims(before)
    dims = varying[: len(varying) - len(old)]
    if len(old) == 1 and -1 in sizes and sizes.index(-1) in dims:
        dims = [dim for dim in varying if dim != sizes.index(-1)]
    for dim in dims:
        tracer.sets.unite_along(after, dim)


def _split(tracer: Tracer, op: Op) -> bool:
    """Unites equal pieces, so that the same split finds them again after a cut."""
    x = op.args[0]
    dim = (op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", 0)) % x.ndim
    labels = tracer.get(x)
    if dim in varying_dims(labels):
        sizes: list[int] = [tensor.shape[dim] for tensor in op.outputs]
        if len(set(sizes)) > 1:
            tracer.sets.freeze(labels, "split at fixed places")
        else:
            tracer.sets.unite_along(split_dim(labels, dim, len(sizes)), dim)
    return _move(tracer, op)


def _glu(tracer: Tracer, op: Op) -> bool:
    """Unites both halves of the channels, as one gates the other."""
    x = op.args[0]
    dim = (op.args[1] if len(op.args) > 1 else -1) % x.ndim
    halves = split_dim(tracer.get(x), dim, 2)
    tracer.put(op.outputs[0], tracer.sets.unite_along(halves, dim))
    return True


def _roll(tracer: Tracer, op: Op) -> bool:
    """Moves labels along other dimensions; channels that roll would end elsewhere after a cut."""
    x: Tensor = op.args[0]
    dims: list[int] = next(iter(op.args[2:]), None) or op.kwargs.get("dims") or []
    if not dims or {dim % x.ndim for dim in dims} & set(varying_dims(tracer.get(x))):
        return False
    return _move(tracer, op)


def _slice(tracer: Tracer, op: Op) -> bool:
    """Freezes channels of which a part is picked by number: a cut would move the numbers."""
    x = op.args[0]
    dim = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % x.ndim
    labels = tracer.get(x)
    is_whole = op.packet is aten.slice and op.outputs[0].shape == x.shape
    _move(tracer, op)
    is_empty = not bool((compact(tracer.get(op.outputs[0])) != NEUTRAL).any())
    if not is_whole and not is_empty and dim in varying_dims(labels):
        tracer.sets.freeze(labels, "channels are picked by number")
    return True


def _pad(tracer: Tracer, op: Op) -> bool:
    """Gives borders the label of the channel they surround; channels that padding adds stay."""
    labels, pads = tracer.get(op.args[0]), list(op.args[1])
    varying = varying_dims(labels)
    for number in range(len(pads) // 2):
        dim, before, after = labels.ndim - 1 - number, pads[2 * number], pads[2 * number + 1]
        if before == after == 0:
            continue
        if dim not in varying:
            shape = list(labels.shape)
            line = compact(labels) if labels.stride(dim) == 0 else labels.amax(dim, keepdim=True)
            shape[dim] += before + after
            labels = line.expand(shape)
            continue
        if min(before, after) < 0:
            tracer.sets.freeze(labels, "channels are picked by number")
        around = [0, 0] * number + [before, after]
        labels = torch.nn.functional.pad(labels, around, value=FROZEN)
    tracer.put(op.outputs[0], labels)
    return True


def _shuffle(tracer: Tracer, op: Op) -> bool:
    labels = tracer.get(op.args[0])
    parts = split_dim(labels, 1, op.args[1])
    _tie_parts(tracer, labels, parts, ())
    tracer.put(op.outputs[0], parts.transpose(1, 2).flatten(1, 2))
    return True


def _as_strided(tracer: Tracer, op: Op) -> bool:
    """Accepts new strides of single pixels, as of a channels_last mean: nothing moves."""
    out = op.outputs[0]
    return out.shape[:2].numel() == out.numel() and tracer.get(op.args[0]).shape == out.shape


def _copy(tracer: Tracer, op: Op) -> bool:
    target, source = op.args[0], op.args[1]
    tracer.put(target, tracer.get(source).expand(target.shape))
    return True


def _per_channel(tracer: Tracer, op: Op) -> bool:
    x = op.args[0]
    sides = PER_CHANNEL[op.packet]
    lines = tracer.channels(x, x.ndim - 1 - sides).view(-1, *[1] * sides)
    for tensor in op.outputs:
        tracer.put(tensor, lines.expand(tensor.shape))
    return True


def _reduce(tracer: Tracer, op: Op) -> bool:
    """Unites branches that are summed; a reduction over the channels themselves leaves none."""
    x = op.args[0]
    place = REDUCTIONS[op.packet]
    dims = op.args[place] if len(op.args) > place else op.kwargs.get("dim")
    if isinstance(dims, Tensor):  # the larger of two tensors
        return _pointwise(tracer, op)
    dims = (
        range(x.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    )
    labels, gone = tracer.get(x), sorted((dim % x.ndim for dim in dims), reverse=True)
    for dim in gone:
        varying = varying_dims(labels)
        if dim not in varying:
            line = labels.narrow(dim, 0, 1)
            labels = line if labels.stride(dim) == 0 else labels.amax(dim, keepdim=True)
        elif len(varying) > 1:
            labels = tracer.sets.unite_along(labels, dim).unsqueeze(dim)
        else:
            if op.packet is not aten.sum:
                tracer.sets.mark_normalised(labels)
            labels = torch.tensor(NEUTRAL).expand(*labels.shape[:dim], 1, *labels.shape[dim + 1 :])
    for tensor in op.outputs:
        kept = [labels.shape[d] for d in range(x.ndim) if tensor.ndim == x.ndim or d not in gone]
        tracer.put(tensor, labels.reshape(kept).expand(tensor.shape))
    return True


def _softmax(tracer: Tracer, op: Op) -> bool:
    x, dim = op.args[0], op.args[1] % op.args[0].ndim
    labels = tracer.get(x)
    varying = varying_dims(labels)
    if dim in varying:
        if len(varying) == 1:
            return False
        tracer.sets.unite_along(labels, dim)
    tracer.put(op.outputs[0], labels)
    return True


def _pointwise(tracer: Tracer, op: Op) -> bool:
    """Unites the labels of all operands, element by element."""
    merged = torch.tensor(NEUTRAL)
    parameters: list[Tensor] = []
    for tensor in op.tensors:
        if not tracer.is_labelled(tensor) and tracer.name_of(tensor):
            parameters.append(tensor)
        else:
            merged = _join(tracer, merged, tracer.get(tensor), is_sum=op.packet in SUMS)
    for tensor in parameters:
        if tensor.numel() > 1 and bool((compact(merged) != NEUTRAL).any()):
            tracer.use_elements(tensor, _reduced(merged, tensor.shape))
        elif tensor.numel() > 1:
            merged = _join(tracer, merged, tracer.get(tensor), is_sum=False)
    for tensor in op.outputs:
        tracer.put(tensor, merged.expand(tensor.shape))
    return True


def _join(tracer: Tracer, first: Tensor, second: Tensor, *, is_sum: bool) -> Tensor:
    for one, other in ((first, second), (second, first)):
        lead = one.ndim - other.ndim
        spread = [d for d in varying_dims(one) if d < lead or other.shape[d - lead] == 1]
        if spread:  # a gate of one channel that acts on many follows none of them
            tracer.sets.freeze(other, "one channel acts on many")
            return broadcast(one, other)[0]
    return tracer.sets.unite(first, second, is_sum=is_sum)


def _reduced(labels: Tensor, shape: Sequence[int]) -> Tensor:
    """Labels for a parameter of this shape; neutral where one value serves several channels."""
    varying = varying_dims(labels)
    lead = labels.ndim - len(shape)
    for dim in range(labels.ndim):
        if dim < lead or shape[dim - lead] == 1:
            if dim in varying:
                return torch.tensor(NEUTRAL).expand(shape)
            labels = labels.narrow(dim, 0, 1)
    return labels.reshape(labels.shape[max(lead, 0) :]).expand(shape)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(MOVES | VIEWS, _move),
    **dict.fromkeys(POINTWISE, _pointwise),
    **dict.fromkeys(PER_CHANNEL, _per_channel),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(MAKERS, _make),
    **dict.fromkeys((aten.split, aten.split_with_sizes), _split),
    **dict.fromkeys((aten.slice, aten.select), _slice),
    **dict.fromkeys((aten._softmax, aten._log_softmax), _softmax),
    **dict.fromkeys((aten.native_channel_shuffle, aten.channel_shuffle), _shuffle),
    aten.constant_pad_nd: _pad,
    aten.glu: _glu,
    aten.native_dropout: _pointwise,
    aten.roll: _roll,
    aten.as_strided_: _as_strided,
    aten.copy_: _copy,
}
