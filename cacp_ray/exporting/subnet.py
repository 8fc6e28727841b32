"""Export of a subnet folder as one file that other programs read.

The file is read back and compared with the network in PyTorch before it gets its name, so every
exported file has been checked.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError, first_line, nearest_names
from cacp_ray.exporting.formats import FORMATS, Network
from cacp_ray.io.files import write_file
from cacp_ray.pruning.subnet import load_subnet, read_description

TOLERANCE = 1e-4  # share of the largest output; another order of float32 sums gives about 1e-6
EXAMPLE_BATCH = 2  # size that exporters trace, other than the sizes that are checked
BATCH_SIZES = (1, 3)
NOTED = (
    "model", "num_classes", "classes", "input_shape", "mean", "std", "rate", "cost", "macs",
    "params",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A file that computes what the subnet computes.

    Attributes:
        path: Path of the file.
        finetuned: Whether it holds the fine-tuned weights.
        size: Size in bytes.
        opset: ONNX opset; None for the other formats.
        max_error: Largest difference of an output at BATCH_SIZES, as a share of the largest.
    """

    path: Path
    finetuned: bool
    size: int
    opset: int | None
    max_error: float


def export_subnet(
    folder: str | Path, format: str, *, out: str | Path | None = None, finetuned: bool | None = None
) -> Exported:
    """Writes a subnet as one file for any batch size, and checks the file.

    Args:
        folder: Subnet folder, such as `runs/NAME/subnets/rate-0.50`.
        format: `onnx`, `torch-export` or `state-dict`.
        out: Path of the file; by default `subnet` with the format's suffix in the folder.
        finetuned: Whether to export the fine-tuned weights; by default where they exist.

    Raises:
        ConfigError: The format is unknown or needs a package that is not installed.
        ArtifactError: The folder is incomplete, or the file exists or cannot be written.
        UnsupportedModelError: The network cannot be exported.
        EvaluationError: The file computes something else and was deleted.
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ConfigError(f"unknown export format {format!r}: {nearest_names(format, FORMATS)}")
    kind = FORMATS[format]
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format {format} needs {', '.join(missing)}: pip install 'cacp-ray[export]'"
        )
    description = read_description(folder, "input_shape")
    path = Path(out) if out is not None else folder / f"subnet{kind.suffix}"
    if path.exists():
        raise ArtifactError(f"{path} exists: delete it, or choose another name with --out")
    if finetuned is None:
        finetuned = (folder / "finetuned.safetensors").exists()
    model = load_subnet(folder, finetuned=finetuned, trust=True).requires_grad_(False)
    shape = tuple(description["input_shape"])
    _check_input(model, shape, folder)
    note = {key: description[key] for key in NOTED if key in description}
    note["weights"] = "finetuned" if finetuned else "search"
    results: list[tuple[int | None, float]] = []

    def write(temporary: Path) -> None:
        example = torch.randn(EXAMPLE_BATCH, *shape, generator=torch.Generator().manual_seed(0))
        opset = kind.write(model, example, json.dumps(note), temporary)
        results.append((opset, compare(model, kind.read(temporary, model), shape)))

    try:
        write_file(path, write)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror or error}): choose another name with --out"
        ) from error
    opset, max_error = results[0]
    return Exported(path, finetuned, path.stat().st_size, opset, max_error)


def _check_input(model: nn.Module, shape: tuple[int, ...], folder: Path) -> None:
    try:
        with torch.no_grad():
            output = model(torch.zeros(1, *shape))
    except Exception as error:  # the network's own code
        raise ArtifactError(
            f"{folder / 'subnet.json'}: the network does not run on its input_shape {shape} "
            f"({first_line(error)[:100]}): one of several inputs cannot be exported; else restore "
            "the file from a copy"
        ) from error
    if not isinstance(output, torch.Tensor):
        raise ConfigError(
            f"{folder}: the network returns a {type(output).__name__}, a file has one tensor out: "
            "load it by load_subnet, and export it with a forward that returns one"
        )


def compare(model: nn.Module, exported: Network, shape: tuple[int, ...]) -> float:
    """Largest difference on random images at every batch size, as a share of the largest output.

    Raises:
        EvaluationError: Outputs differ in shape, or by more than `TOLERANCE`.
    """
    generator = torch.Generator().manual_seed(1)
    largest = 0.0
    for size in BATCH_SIZES:
        images = torch.randn(size, *shape, generator=generator)
        with torch.no_grad():
            expected, got = model(images), exported(images)
        if got.shape != expected.shape:
            raise EvaluationError(
                f"the exported file returns {tuple(got.shape)} for {size} images, the network "
                f"{tuple(expected.shape)}: no file was kept; try another --format"
            )
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        if not error <= TOLERANCE:  # NaN too
            raise EvaluationError(
                f"the exported file differs from the network by {error:.1e} of the largest output "
                f"for {size} images, {TOLERANCE:.0e} is allowed: no file was kept; try another "
                "--format"
            )
        largest = max(largest, error)
    return largest
