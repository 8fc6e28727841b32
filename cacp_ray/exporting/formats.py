"""File formats of an exported network, with their writers and readers.

Every file takes any batch size and carries a note about the subnet: JSON text under the key
`cacp_ray` (ONNX: metadata properties, safetensors: header, torch.export: extra file).
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from cacp_ray.errors import UnsupportedModelError, first_line

logger = logging.getLogger(__name__)

NOTE = "cacp_ray"
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        suffix: Suffix of its files.
        packages: Packages that it needs besides this package's own dependencies.
        write: (network, example input (2, C, H, W), note, path) -> ONNX opset, or None.
        read: (path, network of the same shape, left unchanged) -> the function of the file.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, str, Path], int | None]
    read: Callable[[Path, nn.Module], Network]


def write_onnx(model: nn.Module, example: Tensor, note: str, path: Path) -> int:
    """Writes graph and weights as one ONNX file, with input `image` and output `logits`.

    Raises:
        UnsupportedModelError: torch.onnx cannot convert the network.
    """
    import onnx

    with _exporting("torch.onnx.export"):
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
            input_names=["image"],
            output_names=["logits"],
            verbose=logger.isEnabledFor(logging.DEBUG),
        )
    assert program is not None  # only the old exporter returns None
    proto = program.model_proto
    graph = proto.graph
    # Local source paths and stack traces would be a fifth of a small file.
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
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

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"image": images.numpy()})
        return torch.as_tensor(logits)

    return run


def write_program(model: nn.Module, example: Tensor, note: str, path: Path) -> None:
    """Writes a `torch.export` program with its weights; `torch.export.load(path).module()` runs it.

    Raises:
        UnsupportedModelError: torch.export cannot follow the network.
    """
    with _exporting("torch.export"):
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # local source paths
    with path.open("wb") as file:  # torch accepts only paths that end in .pt2
        torch.export.save(program, file, extra_files={f"{NOTE}.json": note})


def read_program(path: Path, model: nn.Module) -> Network:
    """Reads a `torch.export` program."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_state_dict(model: nn.Module, example: Tensor, note: str, path: Path) -> None:
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
    return network


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Format(".pt2", (), write_program, read_program),
    "state-dict": Format(".safetensors", (), write_state_dict, read_state_dict),
}


@contextmanager
def _exporting(tool: str) -> Iterator[None]:
    """Silences an exporter, except under --debug, and turns its errors into one line."""
    is_quiet = not logger.isEnabledFor(logging.DEBUG)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if is_quiet:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
    except Exception as error:  # compilers fail in many ways, all of them about the network
        raise UnsupportedModelError(
            f"{tool} cannot follow the network for any batch size ({type(error).__name__}: "
            f"{first_line(error)}): try another --format, cacp-ray --debug shows where"
        ) from error
    finally:
        logging.disable(before)
