"""What an exporter is given, and what all exporters share."""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from cacp_ray.errors import UnsupportedModelError, first_line
from cacp_ray.pruning.arguments import Argument, make_inputs
from cacp_ray.pruning.inputs import Inputs, call, tensors_of

logger = logging.getLogger(__name__)

NOTE = "cacp_ray"
EXAMPLE_BATCH = 2  # size that exporters trace, other than the sizes that are checked
Arguments = tuple[Argument, ...]
Network = Callable[[Inputs], Any]  # -> a pytree with the tensors that the network returns


# In the message of torch.onnx for an operator that it does not know: `target=torch.ops.ns.NAME`.
UNTRANSLATED = re.compile(r"Error when translating node .*target=torch\.ops\.\w+\.(\w+)")


@dataclass(frozen=True)
class Source:
    """What is written to a file.

    Attributes:
        net: The network, in evaluation mode.
        arguments: What it is called with.
        note: What the file says of itself, as JSON text.
        calibration: Inputs whose activations give the scales of an INT8 file; empty for others.
    """

    net: nn.Module
    arguments: Arguments
    note: str
    calibration: Sequence[Inputs] = ()


class FileNetwork(nn.Module):
    """A file that is called as its network is, and returns what the network returns."""

    def __init__(self, run: Network, source: Source) -> None:
        super().__init__()
        self._run = run
        with torch.no_grad():
            output = call(source.net, make_example(source.arguments))
        self._leaves, self._spec = tree_flatten(output)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the file; nothing has a gradient."""
        got = iter(tensors_of(self._run(kwargs or (args[0] if len(args) == 1 else args))))
        leaves = [next(got) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        return tree_unflatten(leaves, self._spec)


def make_example(arguments: Arguments) -> Inputs:
    """The inputs that exporters trace."""
    return make_inputs(arguments, EXAMPLE_BATCH, torch.Generator().manual_seed(0))


def split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def dynamic_shapes(model: nn.Module, inputs: Inputs, arguments: Arguments) -> Any:
    """One batch size for all arguments that have a batch, in the form that exporters take."""
    batch = torch.export.Dim("batch", min=1)
    shapes = torch.export.ShapesCollection()
    for tensor, argument in zip(tensors_of(inputs), arguments, strict=True):
        if argument.is_batch:
            shapes[tensor] = {0: batch}
    return shapes.dynamic_shapes(model, *split(inputs)) if len(shapes) else None


def find_layer(net: nn.Module, arguments: Arguments, operator: str) -> str:
    """Path and class of the layer that calls an operator; empty where it is not found."""
    args, kwargs = split(make_example(arguments))
    try:
        graph = torch.export.export(net, args, kwargs).graph
    except Exception:  # the exporter's own error is the one to show
        return ""
    for node in graph.nodes:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        if operator in str(node.target) and stack:
            path, kind = stack[-1]
            return f"{path} ({str(kind).rpartition('.')[2]})"
    return ""


@contextmanager
def exporting(tool: str, arguments: Arguments, net: nn.Module | None = None) -> Iterator[None]:
    """Silences an exporter, except under --debug, and turns its errors into one line.

    With the network that it exports, the line names the layer whose operator has no translation.
    """
    is_quiet = not logger.isEnabledFor(logging.DEBUG)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            if is_quiet:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
                stack.enter_context(redirect_stderr(io.StringIO()))  # graphs that failed
                stack.enter_context(redirect_stdout(io.StringIO()))  # progress bars
            yield
    except Exception as error:  # compilers fail in many ways, all of them about the network
        reason = error.__cause__ or error  # torch.onnx says only where torch.export failed
        what = " for any batch size" if any(each.is_batch for each in arguments) else ""
        step = "try another --format, cacp-ray --debug shows where"
        if net is not None and (lacking := UNTRANSLATED.search(str(reason))):
            operator, layer = lacking[1], find_layer(net, arguments, lacking[1])
            raise UnsupportedModelError(
                f"{tool} has no translation of {operator}{layer and f', in layer {layer}'}: write "
                "that layer with other functions, or try another --format"
            ) from error
        if "data-dependent" in str(reason):
            what = ", because its sizes or its steps depend on values, as in a detector"
            step = "export its backbone and head alone, as docs/export.md shows"
        raise UnsupportedModelError(
            f"{tool} cannot follow the network{what} ({type(reason).__name__}: "
            f"{first_line(reason)}): {step}"
        ) from error
    finally:
        logging.disable(before)
