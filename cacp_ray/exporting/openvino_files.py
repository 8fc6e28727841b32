"""OpenVINO's files, in float32 and in INT8: XML with the weights in a BIN file beside it."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacp_ray.exporting.onnx_files import name_arrays, write_onnx
from cacp_ray.exporting.source import NOTE, Network, Source, exporting
from cacp_ray.pruning.inputs import Inputs


def write_openvino(source: Source, path: Path) -> None:
    """Writes what `openvino.convert_model` makes of the network's ONNX file.

    Raises:
        UnsupportedModelError: torch.onnx or OpenVINO cannot convert the network.
    """
    _save(_convert(source), source, path)


def write_int8(source: Source, path: Path) -> None:
    """Writes a network that NNCF quantises on the calibration inputs.

    Raises:
        UnsupportedModelError: torch.onnx, OpenVINO or NNCF cannot convert the network.
    """
    import nncf

    inputs = [name_arrays(source.net, given) for given in source.calibration]
    examples = sum(len(next(iter(arrays.values()))) for arrays in inputs)
    converted = _convert(source)
    with exporting("nncf.quantize", source.arguments):
        small = nncf.quantize(
            converted, nncf.Dataset(inputs), preset=nncf.QuantizationPreset.MIXED,
            subset_size=max(1, examples),
        )  # fmt: skip
    _save(small, source, path)


def read_openvino(path: Path, model: nn.Module) -> Network:
    """Reads a file into OpenVINO, on the CPU."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }
    compiled = openvino.Core().compile_model(path, "CPU", settings)

    def run(inputs: Inputs) -> list[Tensor]:
        values = compiled(name_arrays(model, inputs))
        return [torch.as_tensor(values[output]) for output in compiled.outputs]

    return run


def _convert(source: Source) -> Any:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "whole.onnx"
        write_onnx(source, file)
        with exporting("openvino.convert_model", source.arguments):
            return openvino.convert_model(file)


def _save(converted: Any, source: Source, path: Path) -> None:
    import openvino

    converted.set_rt_info(source.note, [NOTE])
    openvino.save_model(converted, path, compress_to_fp16=False)
