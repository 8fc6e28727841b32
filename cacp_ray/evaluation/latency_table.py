"""A table of measured layers: a Parquet file, and the cost that it gives a network.

One row is one layer at one width. How it was measured, and the calibration on whole networks, stand
in the file's schema metadata. Summing measured layers follows NetAdapt (Yang et al., 2018); the
monotone surface and the calibration are ours.
"""

import dataclasses
import json
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.latency import Clock
from cacp_ray.files import read_processor, write_file
from cacp_ray.pruning.cost import CostModel
from cacp_ray.pruning.latency_cost import (
    Calibration,
    Grid,
    LatencyCost,
    LayerShape,
    make_latency_cost,
)

KEY = b"cacp_ray.latency"
VERSION = 1


@dataclass(frozen=True)
class Settings:
    """How passes are timed: float32, channels_last, not fused, in inference mode.

    Attributes:
        device: `cpu` or `cuda`.
        threads: Of torch.
        batch: Images a pass.
    """

    device: str = "cpu"
    threads: int = 1
    batch: int = 1

    def check(self) -> None:
        """Refuses a device that is not here.

        Raises:
            ConfigError: It is neither `cpu` nor `cuda`, or there is no CUDA device.
        """
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device {self.device}: choose cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device here; choose cpu")

    @property
    def clock(self) -> Clock:
        """Time of the one thread that works, which other processes do not lengthen; else time."""
        one_thread = self.device == "cpu" and self.threads == 1
        return time.thread_time if one_thread else time.perf_counter


@dataclass(frozen=True)
class Cell:
    """One layer at one width.

    Attributes:
        shape: The layer.
        inputs: C_in, of one part where `shape.groups` > 1; 1 where it is 0.
        outputs: C_out.
        nanoseconds: Median of its passes.
        iqr_nanoseconds: Between the first and the third quartile of its passes.
        repeats: Timed passes.
    """

    shape: LayerShape
    inputs: int
    outputs: int
    nanoseconds: float
    iqr_nanoseconds: float
    repeats: int


@dataclass(frozen=True)
class LatencyTable:
    """Measured layers of a network.

    Attributes:
        network: Its name.
        input_shape: (C, H, W).
        settings: How they were timed.
        round_to: Widths are multiples of this, where a layer's are free.
        processor: Of the machine; the GPU's name on `cuda`.
        torch: Version.
        calibration: From layers to whole networks.
        error: Median relative error of the networks that the calibration was fitted to.
        networks: How many these are.
        cells: The layers.
    """

    network: str
    input_shape: tuple[int, ...]
    settings: Settings
    round_to: int
    processor: str
    torch: str
    calibration: Calibration
    error: float
    networks: int
    cells: tuple[Cell, ...]

    @cached_property
    def grids(self) -> dict[LayerShape, Grid]:
        """The times of every layer shape."""
        return make_grids(self.cells)

    def cost(self, cost_model: CostModel) -> LatencyCost:
        """Nanoseconds of keep counts of a network.

        Raises:
            ConfigError: The table lacks a layer of the network, or its width.
        """
        whole = cost_model.num_channels
        for layer in cost_model.layers:
            grid = self.grids.get(layer.shape)
            inputs = round(float(layer.inputs @ whole + layer.input_bias))
            outputs = round(float(layer.outputs @ whole + layer.output_bias))
            if grid is None or inputs > grid.inputs[-1] or outputs > grid.outputs[-1]:
                raise ConfigError(
                    f"the latency table of {self.network} has no {layer.shape} of {inputs} to "
                    f"{outputs} channels: measure this network, at its image size and classes, "
                    "with `cacp-ray latency measure`"
                )
        return make_latency_cost(cost_model.layers, self.grids, self.calibration)

    def differences(self, network: str, round_to: int) -> list[str]:
        """How a network, its steps of widths and this machine differ from what was measured."""
        found = []
        if round_to % self.round_to:
            found.append(
                f"it was measured at multiples of {self.round_to}, pruning.round_to is {round_to}: "
                "what lies between is interpolated, and may be slower"
            )
        if network != self.network:
            found.append(f"it was calibrated on {self.network}, this is {network}")
        if self.settings.device == "cuda" and not torch.cuda.is_available():
            found.append("it was measured on cuda, which is not here")
        elif (name := name_processor(self.settings.device)) != self.processor:
            found.append(f"it was measured on {self.processor}, this is {name}")
        if self.settings.threads > (os.cpu_count() or 1):
            found.append(f"it was measured with {self.settings.threads} threads")
        if self.torch != torch.__version__:
            found.append(f"it was measured with torch {self.torch}, this is {torch.__version__}")
        return found


def name_processor(device: str) -> str:
    """What the layers run on."""
    return torch.cuda.get_device_name() if device == "cuda" else read_processor()


def make_grids(cells: Iterable[Cell]) -> dict[LayerShape, Grid]:
    """Cells by layer shape.

    Raises:
        ArtifactError: A width is missing.
    """
    by_shape: dict[LayerShape, dict[tuple[int, int], float]] = {}
    for cell in cells:
        by_shape.setdefault(cell.shape, {})[cell.inputs, cell.outputs] = cell.nanoseconds
    grids = {}
    for shape, times in by_shape.items():
        inputs, outputs = (sorted(set(side)) for side in zip(*times, strict=True))
        if len(times) < len(inputs) * len(outputs):
            raise ArtifactError(f"the latency table lacks widths of {shape}: measure it again")
        grids[shape] = Grid(
            np.array(inputs),
            np.array(outputs),
            np.array([[times[a, b] for a in inputs] for b in outputs]),
        )
    return grids


def save_table(table: LatencyTable, path: Path) -> None:
    """Writes a table, whole or not at all."""
    rows = [
        dataclasses.asdict(cell.shape)
        | {key: value for key, value in vars(cell).items() if key != "shape"}
        for cell in table.cells
    ]
    about = {key: value for key, value in vars(table).items() if key not in ("cells", "grids")}
    about |= {
        "version": VERSION,
        "settings": vars(table.settings),
        "calibration": vars(table.calibration),
        "dtype": "float32",
        "memory_format": "channels_last",
    }
    found = pa.Table.from_pylist(rows).replace_schema_metadata({KEY: json.dumps(about).encode()})
    write_file(path, lambda temporary: pq.write_table(found, temporary))


def load_table(path: str | Path) -> LatencyTable:
    """Reads a table.

    Raises:
        ArtifactError: No such file, or no such table in it.
    """
    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = "not a Parquet file" if Path(path).exists() else "no such file"
        raise ArtifactError(
            f"latency table {path}: {reason}; make one with `cacp-ray latency measure`"
        ) from error
    try:
        about: dict[str, Any] = json.loads((found.schema.metadata or {})[KEY])
        if about["version"] != VERSION:
            raise ArtifactError(
                f"latency table {path} has version {about['version']}, this reads {VERSION}: "
                "measure it again"
            )
        table = LatencyTable(
            network=about["network"],
            input_shape=tuple(about["input_shape"]),
            settings=Settings(**about["settings"]),
            round_to=about["round_to"],
            processor=about["processor"],
            torch=about["torch"],
            calibration=Calibration(**about["calibration"]),
            error=about["error"],
            networks=about["networks"],
            cells=tuple(_read_cell(row) for row in found.to_pylist()),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no latency table: make one with `cacp-ray latency measure`"
        ) from error
    _ = table.grids
    return table


def _read_cell(row: dict[str, Any]) -> Cell:
    names = [field.name for field in dataclasses.fields(LayerShape)]
    values = {name: row.pop(name) for name in names}
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items()}
    return Cell(LayerShape(**values), **row)
