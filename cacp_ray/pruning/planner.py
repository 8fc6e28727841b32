"""Makes the plan of a network: traces it, groups its channels and tries the cut out."""

import copy
from contextlib import suppress

import torch
from torch import Tensor, nn

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.forward_pass import add_training_pass, trace_channels
from cacp_ray.pruning.grouping import Grouping, find_groups, make_cost_model
from cacp_ray.pruning.inputs import Inputs, as_written, map_inputs, tensors_of
from cacp_ray.pruning.plan import Consumer, Plan
from cacp_ray.pruning.tracer import Trace
from cacp_ray.pruning.verify import DOES_NOT_TRAIN, find_failures


def make_plan(model: nn.Module, inputs: Inputs) -> Plan:
    """Traces a network, describes how it may be cut, and tries it out.

    Args:
        model: The network, on any device; it is not changed.
        inputs: What it is called with: (1, C, H, W), a tuple of tensors or a dictionary of them.

    Raises:
        UnsupportedModelError: The network does not run, or has no prunable channels.
    """
    with as_written(model):
        return _make_plan(*_on_cpu(model, inputs))


def _make_plan(model: nn.Module, inputs: Inputs) -> Plan:
    trace = trace_channels(model, inputs)
    knows_training = False
    while True:
        grouping = find_groups(trace)
        if not grouping.roots:
            reasons = sorted(set(trace.sets.reasons.values()))
            raise UnsupportedModelError(
                f"no prunable channels in {type(model).__name__}: "
                f"{'; '.join(reasons[:3]) or 'it has no convolutions'}"
            )
        plan = _assemble(model, trace, grouping, tuple(tensors_of(inputs)[0].shape[1:]))
        failures = find_failures(model, plan, inputs)
        if not failures:
            return plan
        if not knows_training and any(r.startswith(DOES_NOT_TRAIN) for r in failures.values()):
            knows_training = True
            with suppress(UnsupportedModelError):
                add_training_pass(model, inputs, trace)
                continue  # with what follows in layers that only training runs
        for group, reason in failures.items():
            trace.sets.freeze(torch.tensor(grouping.roots[group]), reason)


def _on_cpu(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, Inputs]:
    """The network and its inputs where labels are: what a GPU adds up differs from run to run."""
    tensors = [*model.parameters(), *model.buffers()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        model = copy.deepcopy(model).cpu()
    return model, map_inputs(Tensor.cpu, inputs)


def _assemble(
    model: nn.Module, trace: Trace, grouping: Grouping, input_shape: tuple[int, ...]
) -> Plan:
    axes = {
        key: axis
        for key, labels in trace.dims.items()
        if (axis := grouping.axis(trace, labels)) is not None
    }
    consumers = {
        call.weight: Consumer(
            call.weight.rpartition(".")[0], call.weight, trace.batch_norms.get(call.weight)
        )
        for call in trace.calls
        if call.weight is not None and call.is_mixing and (call.weight, 1) in axes
    }
    fixed: dict[str, str] = {}
    for call in trace.calls:
        if call.weight is not None and grouping.axis(trace, call.outputs) is None:
            root = int(call.outputs[0])
            reason = trace.sets.reasons.get(root, "too few channels that are alike")
            fixed[call.weight.rpartition(".")[0]] = reason
    roots = trace.sets.roots(trace.sets.normalised)
    return Plan(
        cost_model=make_cost_model(model, trace, grouping, axes),
        axes=axes,
        consumers=tuple(consumers.values()),
        normalised=tuple(sorted({grouping.group_of[r] for r in roots if r in grouping.group_of})),
        fixed=fixed,
        input_shape=input_shape,
        uncounted=dict(trace.uncounted),
    )
