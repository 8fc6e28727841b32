"""Export of a subnet, also as an INT8 file that the images of its run calibrate and judge."""

import math
from pathlib import Path

from torch import nn

from cacp_ray.config.saved import is_run, read_run_config
from cacp_ray.errors import ConfigError
from cacp_ray.exporting.subnet import Exported, Quantization, export_subnet
from cacp_ray.pruning.calibration import inputs_in_parts
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup

INT8_FORMATS = ("onnx", "openvino")
PART = 100  # calibration images in a pass, whose activations are all kept


def export(
    folder: str | Path,
    format: str,
    *,
    out: str | Path | None = None,
    finetuned: bool | None = None,
    model: nn.Module | None = None,
    int8: bool = False,
    max_drop: float = 1.0,
) -> Exported:
    """Writes a subnet as one file for any batch size, and checks the file.

    Args:
        folder: Subnet folder, such as `runs/NAME/subnets/rate-0.50`.
        format: `onnx`, `openvino`, `torch-export` or `state-dict`.
        out: Path of the file; by default `subnet` with the format's suffix in the folder.
        finetuned: Whether to export the fine-tuned weights; by default where they exist.
        model: The whole network, for a search that was given it as an object.
        int8: Whether to compute with 8-bit integers (ONNX and OpenVINO). The run's calibration
            images give the scales, and its search split the score of the file.
        max_drop: What an INT8 file may lose against float32: points of a share such as top-1, else
            units of the score; 0 or more.

    Raises:
        ConfigError: The format is unknown, has no INT8, or needs a package that is not installed.
        ArtifactError: The folder is incomplete or of no run, or the file exists or cannot be
            written.
        UnsupportedModelError: The network cannot be exported.
        EvaluationError: The file computes something else, or as INT8 loses too much, and was
            deleted.
    """
    if format.endswith("-int8"):
        format, int8 = format.removesuffix("-int8"), True
    if not int8:
        return export_subnet(folder, format, out=out, finetuned=finetuned, model=model)
    if format not in INT8_FORMATS:
        raise ConfigError(f"--int8 is for --format {' and '.join(INT8_FORMATS)}, not {format}")
    if not (math.isfinite(max_drop) and max_drop >= 0):
        raise ConfigError(f"--max-drop {max_drop:g}: give 0 or more, such as 1.0")
    run_dir = Path(folder).resolve().parent.parent
    if not is_run(run_dir):
        raise ConfigError(
            f"{folder} lies in no run, whose images would calibrate an INT8 file: put it into the "
            "`subnets` of its run"
        )
    given = None if model is None else Given(model, None)
    setup = Setup.create(read_run_config(run_dir), run_dir, given)
    return export_subnet(
        folder,
        f"{format}-int8",
        out=out,
        finetuned=finetuned,
        model=model,
        int8=quantization(setup, max_drop),
    )


def quantization(setup: Setup, max_drop: float = math.inf) -> Quantization:
    """What INT8 files of a run's networks are made from and judged by."""
    task = setup.task
    return Quantization(
        inputs_in_parts(setup.calibration, PART),
        lambda net: task.measure(net).score,
        max_drop / task.metric.scale,
        task.metric.describe,
    )
