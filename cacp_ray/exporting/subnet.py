"""`cacp-ray export`: a subnet folder as one file that other programs read.

The file is read back and compared with the network in PyTorch before it gets its name, so a file
that exists is a file that was checked.
"""

import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError
from cacp_ray.exporting.formats import Network, get_format
from cacp_ray.files import write_file
from cacp_ray.pruning.subnet import load_subnet, read_description

TOLERANCE = 1e-4  # of the largest output; float32 in another order of sums gives about 1e-6
EXAMPLE_BATCH = 2  # what the exporters trace: neither of the sizes that are checked
BATCH_SIZES = (1, 3)
NOTED = (
    "model", "num_classes", "classes", "input_shape", "mean", "std", "rate", "cost", "macs",
    "params",
)  # fmt: skip


@dataclass(frozen=True)
class Exported:
    """A file that computes what the subnet computes.

    Attributes:
        path: Of the file.
        finetuned: Whether it holds the fine-tuned weights.
        size: Bytes.
        opset: Of ONNX, None for the other formats.
        max_error: Largest difference of an output, as a share of the largest output.
        batch_sizes: Sizes it was compared at.
    """

    path: Path
    finetuned: bool
    size: int
    opset: int | None
    max_error: float
    batch_sizes: tuple[int, ...]


def export_subnet(
    folder: str | Path,
    format: str,
    *,
    out: str | Path | None = None,
    finetuned: bool | None = None,
) -> Exported:
    """Writes a subnet as one file with any batch size, and checks it.

    Args:
        folder: Such as `runs/NAME/subnets/rate-0.50`.
        format: `onnx`, `torch-export` or `state-dict`.
        out: The file; by default `subnet` with the format's suffix in the folder.
        finetuned: Whether to take the fine-tuned weights; by default where there are some.

    Raises:
        ConfigError: The format is unknown or needs a package that is not installed.
        ArtifactError: The folder is not whole, or the file exists or cannot be written.
        UnsupportedModelError: The network cannot be exported.
        EvaluationError: The file computes something else; it is deleted.
    """
    folder = Path(folder)
    kind = get_format(format)
    missing = [name for name in kind.packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"--format {format} needs {', '.join(missing)}: pip install 'cacp-ray[export]'"
        )
    description = read_description(folder)
    path = Path(out) if out is not None else folder / f"subnet{kind.suffix}"
    if path.exists():
        raise ArtifactError(f"{path} exists: delete it, or choose another name with --out")
    if finetuned is None:
        finetuned = (folder / "finetuned.safetensors").exists()
    model = load_subnet(folder, finetuned=finetuned).requires_grad_(False)
    shape = tuple(description["input_shape"])
    note = {key: description[key] for key in NOTED if key in description}
    note["weights"] = "finetuned" if finetuned else "search"
    found: list[tuple[int | None, float]] = []

    def write(temporary: Path) -> None:
        example = torch.randn(EXAMPLE_BATCH, *shape, generator=torch.Generator().manual_seed(0))
        opset = kind.write(model, example, json.dumps(note), temporary)
        found.append((opset, compare(model, kind.read(temporary, model), shape)))

    try:
        write_file(path, write)
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be written ({error.strerror or error}): choose another name with --out"
        ) from error
    opset, max_error = found[0]
    return Exported(path, finetuned, path.stat().st_size, opset, max_error, BATCH_SIZES)


def compare(model: nn.Module, exported: Network, shape: tuple[int, ...]) -> float:
    """Largest difference on random images at every batch size, as a share of the largest output.

    Args:
        model: In evaluation mode.
        exported: What the file computes.
        shape: (C, H, W).

    Raises:
        EvaluationError: Another shape, or a difference above `TOLERANCE`.
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
