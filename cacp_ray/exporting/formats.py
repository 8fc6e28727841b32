"""File formats of an exported network: how each is written and how it is read back.

Every format takes any batch size, and carries the same note about the subnet: JSON text under the
key `cacp_ray` (ONNX: metadata properties, safetensors: header, torch.export: extra file).
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from cacp_ray.errors import ConfigError, UnsupportedModelError, nearest_names

logger = logging.getLogger(__name__)

NOTE = "cacp_ray"
Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        suffix: Of its files.
        packages: What it needs beyond the package's own dependencies.
        write: (network, example input (2, C, H, W), note, path) -> ONNX opset, None elsewhere.
        read: (path, network of the same shape, not changed) -> what the file computes.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, str, Path], int | None]
    read: Callable[[Path, nn.Module], Network]


def get_format(name: str) -> Format:
    """Looks a format up.

    Raises:
        ConfigError: The name is unknown.
    """
    if name not in FORMATS:
        raise ConfigError(f"unknown export format {name!r}: {nearest_names(name, FORMATS)}")
    return FORMATS[name]


def write_onnx(model: nn.Module, example: Tensor, note: str, path: Path) -> int:
    """One ONNX file, weights inside; input `image`, output `logits`, first dimension `batch`.

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
    assert program is not None  # only the old exporter returns none
    proto = program.model_proto
    graph = proto.graph
    # Source paths of this machine and stack traces: a fifth of a small file.
    for part in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        part.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, {NOTE: note})
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString())
    return next(entry.version for entry in proto.opset_import if entry.domain == "")


def read_onnx(path: Path, model: nn.Module) -> Network:
    """The file in onnxruntime, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    # Its own choice pins threads to cores, which containers refuse with a line each.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        path.read_bytes(), options, providers=["CPUExecutionProvider"]
    )

    def run(images: Tensor) -> Tensor:
        (logits,) = session.run(["logits"], {"image": images.numpy()})
        return torch.as_tensor(logits)

    return run


def write_program(model: nn.Module, example: Tensor, note: str, path: Path) -> None:
    """A `torch.export` program with its weights: `torch.export.load(path).module()` runs it.

    Raises:
        UnsupportedModelError: torch.export cannot follow the network.
    """
    with _exporting("torch.export"):
        program = torch.export.export(
            model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)
        )
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # source paths of this machine
    with path.open("wb") as file:  # a path would have to end in .pt2
        torch.export.save(program, file, extra_files={f"{NOTE}.json": note})


def read_program(path: Path, model: nn.Module) -> Network:
    """The program as torch reads it back."""
    with path.open("rb") as file:
        return torch.export.load(file).module()


def write_state_dict(model: nn.Module, example: Tensor, note: str, path: Path) -> None:
    """A plain safetensors file of the state dict; a tied weight stands under each of its names."""
    # Copies, because safetensors refuses tensors that share memory.
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in model.state_dict().items()
    }
    path.write_bytes(save(tensors, metadata={NOTE: note}))  # save_file makes it private


def read_state_dict(path: Path, model: nn.Module) -> Network:
    """The network with the file's tensors instead of its own."""
    network = copy.deepcopy(model)
    network.load_state_dict(load_file(path), strict=True)
    return network


FORMATS = {
    "onnx": Format(".onnx", ("onnx", "onnxruntime", "onnxscript"), write_onnx, read_onnx),
    "torch-export": Format(".pt2", (), write_program, read_program),
    "state-dict": Format(".safetensors", (), write_state_dict, read_state_dict),
}


@contextmanager
def _exporting(tool: str) -> Iterator[None]:
    """Silences an exporter (not under --debug) and says in one line what it could not do."""
    is_quiet = not logger.isEnabledFor(logging.DEBUG)
    before = logging.root.manager.disable
    try:
        with warnings.catch_warnings():
            if is_quiet:
                logging.disable(logging.WARNING)
                warnings.simplefilter("ignore")
            yield
    except Exception as error:  # compilers fail in many ways, all of them about the network
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise UnsupportedModelError(
            f"{tool} cannot follow the network for any batch size ({type(error).__name__}: "
            f"{reason}): try another --format, cacp-ray --debug shows where"
        ) from error
    finally:
        logging.disable(before)
