"""File formats of an exported network, with their writers and readers.

Every file takes any batch size, unless the inputs have none, and carries a note about the subnet:
JSON text under the key `cacp_ray` (ONNX: metadata properties, safetensors: header, torch.export:
extra file).
"""

import copy
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cacp_ray.errors import UnsupportedModelError, first_line
from cacp_ray.exporting.names import name_inputs, name_outputs
from cacp_ray.pruning.arguments import Argument, make_inputs
from cacp_ray.pruning.inputs import Inputs, call, tensors_of

logger = logging.getLogger(__name__)

NOTE = "cacp_ray"
EXAMPLE_BATCH = 2  # size that exporters trace, other than the sizes that are checked
Arguments = tuple[Argument, ...]
Network = Callable[[Inputs], Any]  # -> a pytree with the tensors that the network returns


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        suffix: Suffix of its files.
        packages: Packages that it needs besides this package's own dependencies.
        write: (network, its arguments, note, path) -> ONNX opset, or None.
        read: (path, network of the same shape, left unchanged) -> the function of the file.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Arguments, str, Path], int | None]
    read: Callable[[Path, nn.Module], Network]


def write_onnx(model: nn.Module, arguments: Arguments, note: str, path: Path) -> int:
    """Writes graph and weights as one ONNX file, with the tensor names of `exporting.names`.

    An output with the name of an input gets `_out` at its end.

    Raises:
        UnsupportedModelError: torch.onnx cannot convert the network.
    """
    import onnx

    example = make_example(arguments)
    args, kwargs = _split(example)
    inputs = name_inputs(model, example)
    with torch.no_grad():
        outputs = [name for name, _ in name_outputs(call(model, example))]
    outputs = [f"{name}_out" if name in inputs else name for name in outputs]
    with _exporting("torch.onnx.export", arguments):
        program = torch.onnx.export(
            model,
            args,
            kwargs=kwargs,
            dynamo=True,
            dynamic_shapes=_dynamic_shapes(model, example, arguments),
            input_names=inputs,
            output_names=outputs,
            verbose=logger.isEnabledFor(logging.DEBUG),
        )
        assert program is not None  # only the old exporter returns None
        for node in program.model.graph:
            for value in node.outputs:
                if value.name in (*inputs, *outputs) and not value.is_graph_output():
                    value.name = f"{value.name}_inside"
        proto = program.model_proto
        graph = proto.graph
        # Local source paths and stack traces would be a fifth of a small file.
        parts = (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer)
        for part in parts:
            part.ClearField("metadata_props")
        onnx.helper.set_model_props(proto, {NOTE: note})
        onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def read_onnx(path: Path, model: nn.Module) -> Network:
    """Reads an ONNX file into onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    # By default threads are pinned to cores, and containers print a refusal for each.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(inputs: Inputs) -> list[Tensor]:
        named = zip(name_inputs(model, inputs), tensors_of(inputs), strict=True)
        values = session.run(None, {name: tensor.numpy() for name, tensor in named})
        return [torch.as_tensor(value) for value in values]

    return run


def write_program(model: nn.Module, arguments: Arguments, note: str, path: Path) -> None:
    """Writes a `torch.export` program with its weights; `torch.export.load(path).module()` runs it.

    It is called as the network is, and returns what the network returns.

    Raises:
        UnsupportedModelError: torch.export cannot follow the network, or save what it returns.
    """
    example = make_example(arguments)
    args, kwargs = _split(example)
    with _exporting("torch.export", arguments):
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=_dynamic_shapes(model, example, arguments)
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # local source paths
        written = io.BytesIO()  # torch accepts only paths that end in .pt2
        torch.export.save(program, written, extra_files={f"{NOTE}.json": note})
    path.write_bytes(written.getvalue())


def read_program(path: Path, model: nn.Module) -> Network:
    """Reads a `torch.export` program."""
    with path.open("rb") as file:
        return partial(call, torch.export.load(file).module())


def write_state_dict(model: nn.Module, arguments: Arguments, note: str, path: Path) -> None:
    """Writes the state dict as safetensors; a tied weight is stored under each of its names."""
    # Copies, because safetensors refuses tensors that share memory; its save_file would let only
    # the owner read the file.
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    path.write_bytes(save(tensors, metadata={NOTE: note}))


def read_state_dict(path: Path, model: nn.Module) -> Network:
    """A copy of the network with the tensors of the file."""
    network = copy.deepcopy(model)
    network.load_state_dict(load(path.read_bytes()), strict=True)
    return partial(call, network)


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Format(".pt2", (), write_program, read_program),
    "state-dict": Format(".safetensors", (), write_state_dict, read_state_dict),
}


def make_example(arguments: Arguments) -> Inputs:
    """The inputs that exporters trace."""
    return make_inputs(arguments, EXAMPLE_BATCH, torch.Generator().manual_seed(0))


def _split(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments of a call."""
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})


def _dynamic_shapes(model: nn.Module, inputs: Inputs, arguments: Arguments) -> Any:
    """One batch size for all arguments that have a batch, in the form that exporters take."""
    batch = torch.export.Dim("batch", min=1)
    shapes = torch.export.ShapesCollection()
    for tensor, argument in zip(tensors_of(inputs), arguments, strict=True):
        if argument.is_batch:
            shapes[tensor] = {0: batch}
    return shapes.dynamic_shapes(model, *_split(inputs)) if len(shapes) else None


@contextmanager
def _exporting(tool: str, arguments: Arguments) -> Iterator[None]:
    """Silences an exporter, except under --debug, and turns its errors into one line."""
    is_quiet = not logger.isEnabledFor(logging.DEBUG)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings(), ExitStack() as stack:
            if is_quiet:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
                stack.enter_context(redirect_stderr(io.StringIO()))  # graphs that failed
            yield
    except Exception as error:  # compilers fail in many ways, all of them about the network
        reason = error.__cause__ or error  # torch.onnx says only where torch.export failed
        what = " for any batch size" if any(each.is_batch for each in arguments) else ""
        step = "try another --format, cacp-ray --debug shows where"
        if "data-dependent" in str(reason):
            what = ", because its sizes or its steps depend on values, as in a detector"
            step = "export its backbone and head alone, as docs/export.md shows"
        raise UnsupportedModelError(
            f"{tool} cannot follow the network{what} ({type(reason).__name__}: "
            f"{first_line(reason)}): {step}"
        ) from error
    finally:
        logging.disable(before)
