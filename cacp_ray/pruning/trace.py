"""One forward pass of a network under a mode that follows its channels.

Every tensor carries an integer label an element. Convolutions and linear layers make new labels,
one an output channel; element-wise operations unite the labels of their operands; data movement
(view, cat, flatten ...) is replayed on the labels themselves. Labels that are united are channels
that must be kept or dropped together. What an operation does to channels is not always known: its
labels are then FROZEN, with the reason, and those channels stay whole.

`tracer` is what the pass remembers; `rules` says what each operation does to labels.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from cacp_ray.errors import UnsupportedModelError
from cacp_ray.pruning.labels import FROZEN
from cacp_ray.pruning.rules import apply_rule
from cacp_ray.pruning.tracer import Trace, Tracer


def trace(model: nn.Module, example_input: Tensor) -> Trace:
    """Runs `model` once in evaluation mode on (1, C, H, W) and follows its channels.

    Raises:
        UnsupportedModelError: The forward pass fails, or the output is no tensor.
    """
    modes = {module: module.training for module in model.modules()}
    buffers = [(m, name, b) for m in model.modules() for name, b in m._buffers.items()]
    values = [None if b is None else b.clone() for _, _, b in buffers]
    model.eval()
    example_input = example_input.clone(memory_format=torch.contiguous_format)
    tracer = Tracer(model)
    tracer.put(example_input, torch.full(example_input.shape, FROZEN))
    try:
        with torch.no_grad(), _Mode(tracer):
            output = model(example_input)
    except Exception as error:  # the network's own code
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedModelError(
            f"the network does not run on an input of shape {tuple(example_input.shape)} "
            f"({reason}): check the input size"
        ) from error
    finally:
        for module, is_training in modes.items():
            module.training = is_training
        for module in modes:
            for name in module._buffers.keys() - {n for m, n, _ in buffers if m is module}:
                del module._buffers[name]  # made on the way
        for (module, name, buffer), value in zip(buffers, values, strict=True):
            module._buffers[name] = buffer  # a forward pass may have counted in it
            if buffer is not None and value is not None:
                buffer.copy_(value)
    outputs = [t for t in tree_flatten(output)[0] if isinstance(t, Tensor)]
    if not outputs:
        raise UnsupportedModelError(f"the network returns {type(output).__name__}, not tensors")
    for tensor in outputs:
        tracer.trace.sets.freeze(tracer.get(tensor), "output of the network")
    tracer.finish()
    return tracer.trace


class _Mode(TorchDispatchMode):
    """Runs every operation, then lets the rules label its result."""

    def __init__(self, tracer: Tracer) -> None:
        super().__init__()
        self._tracer = tracer

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports torch._dynamo first, some seconds

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        apply_rule(self._tracer, func, out, args, kwargs or {})
        return out
