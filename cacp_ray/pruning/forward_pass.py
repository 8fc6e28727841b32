"""Forward passes of a network under a mode that follows its channels.

Every tensor carries one integer label for each element. Convolutions and linear layers make new
labels, one for each output channel; element-wise operations unite the labels of their operands;
data movement (view, cat, flatten ...) is replayed on the labels themselves. Labels that are united
are channels that must be kept or dropped together. Where it is not known what an operation does to
channels, its labels are FROZEN, with the reason, and those channels stay whole.

`tracer` is what the pass remembers; `rules` says what each operation does to labels.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cacp_ray.errors import UnsupportedModelError, is_out_of_memory
from cacp_ray.pruning.flops import without_fast_paths
from cacp_ray.pruning.inputs import (
    Inputs,
    call,
    describe_shapes,
    map_inputs,
    repeat_batch,
    tensors_of,
)
from cacp_ray.pruning.labels import FROZEN
from cacp_ray.pruning.rules import apply_rule
from cacp_ray.pruning.torch_types import own_random_state
from cacp_ray.pruning.tracer import Trace, Tracer


def trace_channels(model: nn.Module, inputs: Inputs) -> Trace:
    """Runs `model` once in evaluation mode and follows its channels.

    Raises:
        UnsupportedModelError: The forward pass fails, or the output is no tensor.
    """
    tracer = Tracer(model)
    _follow(model, inputs, tracer)
    return tracer.trace


def add_training_pass(model: nn.Module, inputs: Inputs, trace: Trace) -> None:
    """Follows the channels in training mode as well, into layers that it alone runs.

    Auxiliary heads, for example, then follow the channels that they take. Cost stays that of
    evaluation mode.

    Raises:
        UnsupportedModelError: The network does not run in training mode.
    """
    _follow(model, repeat_batch(inputs), Tracer(model, trace), training=True)


def _follow(model: nn.Module, inputs: Inputs, tracer: Tracer, *, training: bool = False) -> None:
    """One pass, whose labels the tracer keeps; the network is as before afterwards."""
    inputs = map_inputs(lambda x: x.clone(memory_format=torch.contiguous_format), inputs)
    for tensor in tensors_of(inputs):
        tracer.put(tensor, torch.full(tensor.shape, FROZEN))
    mode = _Mode()
    mode.tracer = tracer
    with _as_it_was(model), without_fast_paths(), own_random_state():
        model.train(training)
        try:
            with torch.no_grad(), mode:
                output = call(model, inputs)
        except Exception as error:  # the network's own code
            if is_out_of_memory(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            how = " in training mode" if training else ""
            raise UnsupportedModelError(
                f"the network does not run on an input of {describe_shapes(inputs)}{how} "
                f"({reason}): check the inputs"
            ) from error
    outputs = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if not outputs:
        raise UnsupportedModelError(f"the network returns {type(output).__name__}, not tensors")
    for tensor in outputs:
        tracer.trace.sets.freeze(tracer.get(tensor), "output of the network")
    tracer.finish()


@contextmanager
def _as_it_was(model: nn.Module) -> Generator[None]:
    """Gives modules their mode and their buffers back, in which a forward pass may have counted."""
    was_training = {module: module.training for module in model.modules()}
    buffers = {module: dict(_buffers(module)) for module in was_training}
    values = {
        id(buffer): buffer.clone()
        for own in buffers.values()
        for buffer in own.values()
        if buffer is not None
    }
    try:
        yield
    finally:
        for module, is_training in was_training.items():
            module.training = is_training
            own = _buffers(module)
            for name in own.keys() - buffers[module].keys():
                del own[name]  # made by the forward pass
            own.update(buffers[module])
        for own in buffers.values():
            for buffer in own.values():
                if buffer is not None:
                    buffer.copy_(values[id(buffer)])


def _buffers(module: nn.Module) -> dict[str, Tensor | None]:
    """The dictionary that holds a module's own buffers."""
    return vars(module)["_buffers"]


class _Mode(TorchDispatchMode):
    """Runs every operation, then lets the rules label its result."""

    tracer: Tracer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports torch._dynamo first, which takes some seconds

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        apply_rule(self.tracer, func, out, args, kwargs or {})
        return out
