"""File formats of an exported network, with their writers and readers.

Every file takes any batch size, unless the inputs have none, and carries a note about the subnet:
JSON text under the key `cacp_ray` (ONNX: metadata properties, OpenVINO: runtime information,
safetensors: header, torch.export: extra file).
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from cacp_ray.exporting import onnx_files, openvino_files, torch_files
from cacp_ray.exporting.source import Network, Source


@dataclass(frozen=True)
class Format:
    """One file format.

    Attributes:
        suffix: Suffix of its files.
        write: (network, path) -> ONNX opset, or None.
        read: (path, network of the same shape, left unchanged) -> the function of the file.
        packages: Packages that it needs besides this package's own dependencies.
        extra: The extra of this package that brings them.
        beside: Suffix of a second file, which the writer puts beside the first.
        is_int8: Whether it computes with 8-bit integers, and so needs calibration inputs.
    """

    suffix: str
    write: Callable[[Source, Path], int | None]
    read: Callable[[Path, nn.Module], Network]
    packages: tuple[str, ...] = ()
    extra: str = ""
    beside: str | None = None
    is_int8: bool = False

    def missing_packages(self) -> list[str]:
        """Packages that it needs and that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


ONNX = ("onnx", "onnxruntime", "onnxscript")
OPENVINO = ("openvino", *ONNX)
FORMATS = {
    "onnx": Format(".onnx", onnx_files.write_onnx, onnx_files.read_onnx, ONNX, "export"),
    "onnx-int8": Format(
        ".int8.onnx", onnx_files.write_int8, onnx_files.read_onnx, ONNX, "export", is_int8=True
    ),
    "openvino": Format(
        ".xml", openvino_files.write_openvino, openvino_files.read_openvino, OPENVINO, "openvino",
        ".bin",
    ),
    "openvino-int8": Format(
        ".int8.xml", openvino_files.write_int8, openvino_files.read_openvino, ("nncf", *OPENVINO),
        "openvino", ".bin", is_int8=True,
    ),
    "torch-export": Format(".pt2", torch_files.write_program, torch_files.read_program),
    "state-dict": Format(
        ".safetensors", torch_files.write_state_dict, torch_files.read_state_dict
    ),
}  # fmt: skip
