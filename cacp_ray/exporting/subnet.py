"""Export of a subnet folder as one file that other programs read.

The file is read back and compared with the network in PyTorch before it gets its name, so every
exported file has been checked.
"""

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from cacp_ray.errors import (
    ArtifactError,
    CacpError,
    ConfigError,
    EvaluationError,
    first_line,
    is_out_of_memory,
    nearest_names,
)
from cacp_ray.exporting.formats import FORMATS, Format
from cacp_ray.exporting.names import name_outputs
from cacp_ray.exporting.source import Arguments, FileNetwork, Network, Source, make_example
from cacp_ray.pruning.arguments import DTYPES, make_inputs, read_arguments
from cacp_ray.pruning.inputs import Inputs, call, tensors_of
from cacp_ray.pruning.subnet import load_subnet, read_description

T = TypeVar("T")
TOLERANCE = 1e-4  # share of the largest output; another order of float32 sums gives about 1e-6
BATCH_SIZES = (1, 3)
NOTED = (
    "model", "num_classes", "classes", "input_shape", "inputs", "mean", "std", "rate", "cost",
    "macs", "params",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A file that computes what the subnet computes.

    Attributes:
        path: Path of the file.
        finetuned: Whether it holds the fine-tuned weights.
        size: Size in bytes.
        opset: ONNX opset; None for the other formats.
        max_error: Largest difference of an output, as a share of its largest value; of an INT8
            file, which is judged by its score, 0.
        batch_sizes: Sizes at which it was checked; empty where the inputs have no batch, so that
            the file takes tensors of their very shapes only.
        scores: Scores of the network in float32 and of its INT8 file, in words; None for others.
    """

    path: Path
    finetuned: bool
    size: int
    opset: int | None
    max_error: float
    batch_sizes: tuple[int, ...]
    scores: tuple[str, str] | None = None


@dataclass(frozen=True)
class Quantization:
    """What an INT8 file is made from and judged by.

    Attributes:
        calibration: Inputs whose activations give the scales.
        measure: Score of a network.
        max_drop: What the score may lose against float32.
        describe: A score in words.
    """

    calibration: Sequence[Inputs]
    measure: Callable[[nn.Module], float]
    max_drop: float
    describe: Callable[[float], str]


def export_subnet(
    folder: str | Path,
    format: str,
    *,
    out: str | Path | None = None,
    finetuned: bool | None = None,
    model: nn.Module | None = None,
    int8: Quantization | None = None,
) -> Exported:
    """Writes a subnet as one file for any batch size, and checks the file.

    It takes what the search's example inputs hold, and returns what the network returns.

    Args:
        folder: Subnet folder, such as `runs/NAME/subnets/rate-0.50`.
        format: `onnx`, `openvino`, `torch-export` or `state-dict`; the first two also as INT8,
            `onnx-int8` and `openvino-int8`.
        out: Path of the file; by default `subnet` with the format's suffix in the folder.
        finetuned: Whether to export the fine-tuned weights; by default where they exist.
        model: The whole network, for a search that was given it as an object.
        int8: What an INT8 file is made from.

    Raises:
        ConfigError: The format is unknown or needs a package that is not installed.
        ArtifactError: The folder is incomplete, or the file exists or cannot be written.
        UnsupportedModelError: The network cannot be exported.
        EvaluationError: The file computes something else, or as INT8 loses too much, and was
            deleted.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}: {nearest_names(format, FORMATS)}")
    kind = FORMATS[format]
    if missing := kind.missing_packages():
        raise ConfigError(
            f"--format {format} needs {', '.join(missing)}: pip install 'cacp-ray[{kind.extra}]'"
        )
    read_description(folder, "input_shape")
    path = Path(out) if out is not None else folder / f"subnet{kind.suffix}"
    if kind.beside is not None and path.suffix != kind.suffix[-4:]:
        raise ConfigError(f"--out {path}: this format needs a name that ends in {kind.suffix[-4:]}")
    for taken in (path, *([] if kind.beside is None else [path.with_suffix(kind.beside)])):
        if taken.exists():
            raise ArtifactError(f"{taken} exists: delete it, or choose another name with --out")
    if finetuned is None:
        finetuned = (folder / "finetuned.safetensors").exists()
    description = read_description(folder, "input_shape", is_finetuned=finetuned)
    net = load_subnet(folder, finetuned=finetuned, trust=True, model=model).requires_grad_(False)
    arguments = read_arguments(description)
    _check_call(net, arguments, folder)
    note = {key: description[key] for key in NOTED if key in description}
    note["weights"] = "finetuned" if finetuned else "search"
    source = Source(net, arguments, json.dumps(note), () if int8 is None else int8.calibration)
    max_error, scores = 0.0, None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
            made = Path(temporary) / path.name
            opset = kind.write(source, made)
            if int8 is None:
                max_error = _read_and_compare(net, kind, made, arguments)
            else:
                scores = _read_and_judge(source, kind, made, int8)
            if kind.beside is not None:  # first: a file without its weights would look complete
                os.replace(made.with_suffix(kind.beside), path.with_suffix(kind.beside))
            os.replace(made, path)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror or error}): choose another name with --out"
        ) from error
    size = path.stat().st_size
    if kind.beside is not None:
        size += path.with_suffix(kind.beside).stat().st_size
    return Exported(path, finetuned, size, opset, max_error, _batch_sizes(arguments), scores)


def _check_call(model: nn.Module, arguments: Arguments, folder: Path) -> None:
    """Refuses inputs that cannot be made, or that the network does not run on."""
    file = folder / "subnet.json"
    for index, argument in enumerate(arguments):
        if argument.shape is None:
            raise ConfigError(
                f"{file}: argument {argument.name or index + 1} of the network is no tensor of "
                f"{', '.join(DTYPES)}: load the network by load_subnet, wrap it in a module that "
                "takes tensors alone, and export that by torch.export"
            )
    try:
        with torch.no_grad():
            output = call(model, make_example(arguments))
    except Exception as error:  # the network's own code
        if len(arguments) == 1 and arguments[0].is_plain:
            what = f"input_shape {arguments[0].shape}"
            step = "search again if it takes several inputs, which older versions did not note; "
        else:
            what, step = f"inputs ({', '.join(map(str, arguments))})", ""
        raise ArtifactError(
            f"{file}: the network does not run on its {what} ({first_line(error)[:100]}): {step}"
            f"{'else ' if step else ''}restore the file from a copy"
        ) from error
    if not name_outputs(output):
        raise ConfigError(
            f"{folder}: the network returns a {type(output).__name__} without tensors that "
            "torch can see: register its class by torch.export.register_dataclass, or return a "
            "tuple or a dictionary"
        )


def _batch_sizes(arguments: Arguments) -> tuple[int, ...]:
    return BATCH_SIZES if any(argument.is_batch for argument in arguments) else ()


def _read_and_compare(model: nn.Module, kind: Format, path: Path, arguments: Arguments) -> float:
    return _running(lambda: compare(model, kind.read(path, model), arguments))


def _read_and_judge(
    source: Source, kind: Format, path: Path, int8: Quantization
) -> tuple[str, str]:
    """Scores of the network and of its INT8 file, which has run at every batch size."""

    def run() -> FileNetwork:
        network = kind.read(path, source.net)
        for size in _batch_sizes(source.arguments) or (1,):
            network(make_inputs(source.arguments, size, torch.Generator().manual_seed(1)))
        return FileNetwork(network, source)

    file = _running(run)
    before, after = int8.measure(source.net), _running(lambda: int8.measure(file))
    scores = int8.describe(before), int8.describe(after)
    if not before - after <= int8.max_drop:  # NaN too
        raise EvaluationError(
            "{} in float32, {} in INT8: that loses more than --max-drop allows, and no file was "
            "kept; raise it, or export without --int8".format(*scores)
        )
    return scores


def _running(run: Callable[[], T]) -> T:
    """Runs an exported file; errors of its runtime become one line."""
    try:
        return run()
    except (CacpError, OSError):
        raise
    except Exception as error:  # a runtime that lacks an operation or a type
        if is_out_of_memory(error):
            raise
        raise EvaluationError(
            f"the exported file does not run here ({type(error).__name__}: "
            f"{first_line(error)[:200]}): no file was kept; try another --format"
        ) from error


def compare(model: nn.Module, exported: Network, arguments: Arguments) -> float:
    """Largest difference of an output at every batch size, as a share of its largest value.

    Raises:
        EvaluationError: Outputs differ in number, in shape, or by more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for size in _batch_sizes(arguments) or (None,):
        where = "" if size is None else f" at batch size {size}"
        inputs = make_inputs(arguments, size or 1, generator)
        with torch.no_grad():
            expected, got = name_outputs(call(model, inputs)), tensors_of(exported(inputs))
        if len(got) != len(expected):
            raise EvaluationError(
                f"the exported file returns {len(got)} tensors{where}, the network "
                f"{len(expected)}: no file was kept; try another --format"
            )
        for (name, wanted), tensor in zip(expected, got, strict=True):
            largest = max(largest, _compare(name, wanted, tensor, where))
    return largest


def _compare(name: str, expected: Tensor, got: Tensor, where: str) -> float:
    """Largest difference of one output, as a share of its largest value."""
    if got.shape != expected.shape:
        raise EvaluationError(
            f"the exported file returns output {name} of shape {tuple(got.shape)}{where}, the "
            f"network {tuple(expected.shape)}: no file was kept; try another --format"
        )
    if not expected.numel():
        return 0.0
    if not expected.is_floating_point():
        expected, got = expected.double(), got.double()
    error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:  # NaN too
        raise EvaluationError(
            f"output {name} of the exported file differs from the network's by {error:.1e} of its "
            f"largest value{where}, {TOLERANCE:.0e} is allowed: no file was kept; try another "
            "--format"
        )
    return error
