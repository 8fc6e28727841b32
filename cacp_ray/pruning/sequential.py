"""Sequential recovery: every layer is fitted to the inputs that it gets in the cut network.

Compensation (`cacp_ray.pruning.compensation`) takes statistics of the whole network, so each layer
is repaired as if all others were whole, and errors add up along the network. Here layers are
visited in forward order: the inputs x' come from the cut network, whose earlier layers are repaired
already, and the targets y are the outputs of the original layer for the same images at the same
places. The fit is least squares with intercept, and the ridge pulls towards the compensated weight;
where a BN layer follows, each row is scaled so that the outputs keep their variance. It costs one
pass of the original network and one of the cut network: too much for a candidate, little for a
final subnet.

Source: the order of repair is that of ThiNet (Luo et al., 2017) and of channel pruning (He et al.,
2017, section 3.2: "whole model pruning" takes the targets of the original network). Ours: one pass,
in which each layer solves as soon as its inputs arrive. Left out: a target that also makes up for
the drift of a shortcut (CACP, supplement), for which the plan would have to know what is added.

Memory: the targets take up to TARGET_BYTES; the cut network sees all images in one batch of up to
BATCH_PIXELS pixels; only products of its inputs are stored.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cacp_ray.pruning.calibration import PASSED, take_inputs_at
from cacp_ray.pruning.inputs import Inputs, call, tensors_of
from cacp_ray.pruning.patches import PLAIN_FORWARDS, choose_places, take_inputs, take_outputs
from cacp_ray.pruning.plan import Consumer, Plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.statistics import POSITIONS, SEPARABLE_ABOVE, regularized
from cacp_ray.pruning.surgery import Orders
from cacp_ray.pruning.torch_types import cholesky

TARGET_BYTES = 2**29
ROWS_PER_INPUT = 4  # a layer with fewer keeps its compensated weight: it would fit noise
BATCH_PIXELS = 2**23  # 8,192 images of 32x32, 167 of 224x224


@dataclass
class _Target:
    """Outputs of a layer of the original network at sampled places, batch by batch."""

    places: list[Tensor] = field(default_factory=list[Tensor])
    rows: list[Tensor] = field(default_factory=list[Tensor])  # each (N * P, kept outputs)


def recover_sequentially(
    model: nn.Module,
    plan: Plan,
    tensors: Mapping[str, Tensor],
    orders: Orders,
    keep_counts: Sequence[int],
    inputs: Inputs,
    *,
    seed: int,
    positions: int = POSITIONS,
    batch_size: int = PASSED,
) -> dict[str, Tensor]:
    """Repairs one cut network, layer by layer.

    A layer keeps its `tensors` if it is called more than once, overrides forward, mixes images in
    its batch entries, keeps more than SEPARABLE_ABOVE inputs, or has fewer than ROWS_PER_INPUT rows
    for each input.

    `tensors` are those of the cut network, compensated (`Compensator`); the result has repaired
    weights, biases and running means. `inputs` are a batch of training examples.
    """
    first = tensors_of(inputs)[0]
    size = min(len(first), max(1, BATCH_PIXELS // first.shape[2:].numel()))
    inputs = take_inputs_at(inputs, slice(size))
    original = model.state_dict()
    outputs = {
        c.weight: _kept_outputs(plan, c, len(original[c.weight]), orders, keep_counts)
        for c in plan.consumers
    }
    width = sum(len(tensors[consumer.weight]) for consumer in plan.consumers)
    positions = max(1, min(positions, TARGET_BYTES // (4 * size * max(1, width))))
    starts = range(0, size, batch_size)
    batches = [take_inputs_at(inputs, slice(start, start + batch_size)) for start in starts]
    targets = _collect_targets(model, plan, outputs, batches, positions, seed)
    resizable = ResizableNetwork(model)
    small = resizable.load(tensors)
    state = small.state_dict()
    for consumer in plan.consumers:  # intercepts are subtracted from the original running means
        name = f"{consumer.batch_norm}.running_mean"
        if name in state:
            state[name] = original[name][outputs[consumer.weight]]
    result = dict(tensors)
    for consumer in plan.consumers:
        if consumer.weight not in targets:
            continue

        def repair(module: nn.Module, args: tuple[Any, ...], consumer: Consumer = consumer) -> None:
            target = targets.pop(consumer.weight)
            # Windows or places of one image may have become neighbouring batch entries.
            entries = max(1, len(args[0]) // size)
            parts = args[0].split(entries * batch_size)
            if _belong_together(parts, target):
                new = _fit(module, consumer, parts, target, state)
                result.update(new)
                resizable.load(new)

        small.get_submodule(consumer.module).register_forward_pre_hook(repair)
    with torch.no_grad():
        call(small, inputs)
    return result


def _kept_outputs(
    plan: Plan, consumer: Consumer, width: int, orders: Orders, keep_counts: Sequence[int]
) -> Tensor:
    """Original indices of the outputs that the cut layer keeps, in its order."""
    axis = plan.axes.get((consumer.weight, 0))
    if axis is None:
        return torch.arange(width)
    return torch.as_tensor(axis.reordered(orders)[axis.positions(keep_counts)])


def _collect_targets(
    model: nn.Module,
    plan: Plan,
    outputs: Mapping[str, Tensor],
    batches: Sequence[Inputs],
    positions: int,
    seed: int,
) -> dict[str, _Target]:
    """Targets of the layers that are called once in a pass, by weight name."""
    generator = torch.Generator().manual_seed(seed)
    targets: dict[str, _Target] = {}
    calls: Counter[str] = Counter()
    hooks: list[RemovableHandle] = []
    for consumer in plan.consumers:

        def record(
            module: nn.Module, args: tuple[Any, ...], y: Tensor, name: str = consumer.weight
        ) -> None:
            calls[name] += 1
            places = choose_places(module, args[0], positions, generator)
            target = targets.setdefault(name, _Target())
            target.places.append(places)
            target.rows.append(take_outputs(module, y, places)[:, outputs[name]])

        module = model.get_submodule(consumer.module)
        if type(module).forward in PLAIN_FORWARDS:
            hooks.append(module.register_forward_hook(record))
    try:
        model.eval()
        with torch.inference_mode():
            for batch in batches:
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: target for name, target in targets.items() if calls[name] == len(batches)}


def _belong_together(inputs: Sequence[Tensor], target: _Target) -> bool:
    """Whether each batch of the cut network has as many rows as that of the original network."""
    rows = [len(x) * len(p) for x, p in zip(inputs, target.places, strict=False)]
    return len(inputs) == len(target.rows) and rows == [len(y) for y in target.rows]


def _fit(
    module: nn.Module,
    consumer: Consumer,
    inputs: Sequence[Tensor],
    target: _Target,
    state: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """New tensors of one layer, or none where its rows are too few for its inputs."""
    weight = state[consumer.weight]
    start = weight.flatten(1).double()
    size, num_rows = start.shape[1], sum(len(y) for y in target.rows)
    if size > SEPARABLE_ABOVE or num_rows < ROWS_PER_INPUT * size:
        return {}
    # Products are taken in float32 about means and summed in float64.
    y_mean = torch.stack([y.double().sum(0) for y in target.rows]).sum(0) / num_rows
    y_square = torch.zeros_like(y_mean)
    x_guess = take_inputs(module, inputs[0], target.places[0]).mean(0)
    x_total = torch.zeros(size, dtype=torch.float64)
    square = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, len(start), dtype=torch.float64)
    for x, places, y in zip(inputs, target.places, target.rows, strict=True):
        rows = take_inputs(module, x, places) - x_guess
        centred = y - y_mean.float()
        x_total += rows.double().sum(0)
        square += rows.T @ rows
        cross += rows.T @ centred
        y_square += centred.square().sum(0)
    x_mean = x_total / num_rows
    covariance = square / num_rows - torch.outer(x_mean, x_mean)
    ridged = regularized(covariance)
    right = cross / num_rows + (ridged - covariance) @ start.T
    solved = torch.cholesky_solve(right, cholesky(ridged))  # (D, N)
    if consumer.batch_norm is not None:
        fitted = (solved * (covariance @ solved)).sum(0)
        wanted = y_square / num_rows
        is_fitted = fitted > 1e-9 * wanted
        solved = solved * torch.where(is_fitted, (wanted / fitted).sqrt(), 0.0)
    offset = (y_mean - (x_mean + x_guess) @ solved).float()
    new = {consumer.weight: solved.T.float().reshape(weight.shape)}
    bias = f"{consumer.module}.bias"
    if bias in state:
        new[bias] = offset
    elif consumer.batch_norm is not None:
        mean = f"{consumer.batch_norm}.running_mean"
        new[mean] = state[mean] - offset
    return new
