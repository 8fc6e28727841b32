"""A table of measured layers: a Parquet file, and the cost that it gives a network.

One row is one layer at one width. The schema metadata hold the settings of the measurement and the
calibration on whole networks. Summing measured layers follows NetAdapt (Yang et al., 2018); the
monotone surface and the calibration are ours.
"""

# pyarrow has no complete types:
# pyright: basic

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
from cacp_ray.io.environment import read_processor
from cacp_ray.io.files import parse_json, write_file
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
TORCH, OPENVINO, COMMAND = "torch", "openvino", "command"
RUNTIMES = (TORCH, "onnxruntime", OPENVINO)


@dataclass(frozen=True)
class Settings:
    """How passes are timed, in float32; by torch in channels_last, not fused, in inference mode."""

    device: str = "cpu"  # `cpu` or `cuda`
    threads: int = 1  # threads of the runtime
    batch: int = 1  # images a pass
    runtime: str = TORCH  # of RUNTIMES, or `command`
    command: str | None = None  # program that times an ONNX file

    def check(self) -> None:
        """Refuses a device that this machine does not have.

        Raises:
            ConfigError: The runtime is unknown, the device is neither `cpu` nor `cuda`, or there is
                no CUDA device.
        """
        if self.runtime not in (*RUNTIMES, COMMAND):
            raise ConfigError(f"runtime {self.runtime}: choose {', '.join(RUNTIMES)}")
        if self.runtime != TORCH and self.device != "cpu":
            raise ConfigError(f"device {self.device}: {self.runtime} is timed on the CPU")
        if self.device not in ("cpu", "cuda"):
            raise ConfigError(f"device {self.device}: choose cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device cuda: torch finds no CUDA device here; choose cpu")

    @property
    def clock(self) -> Clock:
        """CPU time where one thread works: other processes do not lengthen it; else wall time."""
        one_thread = self.device == "cpu" and self.threads == 1
        if not one_thread:
            return time.perf_counter
        # OpenVINO works in a thread of its own.
        return time.process_time if self.runtime == OPENVINO else time.thread_time


@dataclass(frozen=True)
class Cell:
    """One layer at one width."""

    shape: LayerShape
    inputs: int  # C_in, in one part where `shape.groups` > 1; 1 where `shape.groups` is 0
    outputs: int  # C_out
    nanoseconds: float  # median of the passes
    iqr_nanoseconds: float  # interquartile range of the passes
    repeats: int  # timed passes


@dataclass(frozen=True)
class LatencyTable:
    """Measured layers of a network."""

    network: str  # name of the network
    input_shape: tuple[int, ...]  # (C, H, W)
    settings: Settings
    round_to: int  # widths of layers that are cut are multiples of this
    processor: str  # name of the processor; of the GPU on `cuda`
    torch: str  # version of torch
    calibration: Calibration  # from the sum of layers to whole networks
    error: float  # median relative error of the networks that the calibration was fitted to
    networks: int  # number of these networks
    cells: tuple[Cell, ...]

    @cached_property
    def grids(self) -> dict[LayerShape, Grid]:
        """Times of every layer shape."""
        return make_grids(self.cells)

    def cost(self, cost_model: CostModel) -> LatencyCost:
        """The cost of a network's keep counts in nanoseconds.

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
        differences: list[str] = []
        if round_to % self.round_to:
            differences.append(
                f"it was measured at multiples of {self.round_to}, pruning.round_to is {round_to}: "
                "what lies between is interpolated, and may be slower"
            )
        if network != self.network:
            differences.append(f"it was calibrated on {self.network}, this is {network}")
        if self.settings.device == "cuda" and not torch.cuda.is_available():
            differences.append("it was measured on cuda, which is not here")
        elif (name := name_processor(self.settings.device)) != self.processor:
            differences.append(f"it was measured on {self.processor}, this is {name}")
        if self.settings.threads > (os.cpu_count() or 1):
            differences.append(f"it was measured with {self.settings.threads} threads")
        if self.torch != torch.__version__:
            differences.append(
                f"it was measured with torch {self.torch}, this is {torch.__version__}"
            )
        return differences


def name_processor(device: str) -> str:
    """Name of the processor that runs the layers."""
    return torch.cuda.get_device_name() if device == "cuda" else read_processor()


def make_grids(cells: Iterable[Cell]) -> dict[LayerShape, Grid]:
    """Times of the cells by layer shape.

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
    """Writes a table, completely or not at all."""
    rows = [vars(cell.shape) | vars(cell) for cell in table.cells]
    for row in rows:
        del row["shape"]
    about = {key: value for key, value in vars(table).items() if key not in ("cells", "grids")}
    about |= {
        "version": VERSION,
        "settings": vars(table.settings),
        "calibration": vars(table.calibration),
        "dtype": "float32",
        "memory_format": "channels_last",
    }
    parquet = pa.Table.from_pylist(rows).replace_schema_metadata({KEY: json.dumps(about).encode()})
    write_file(path, lambda temporary: pq.write_table(parquet, temporary))


def load_table(path: str | Path) -> LatencyTable:
    """Reads a table.

    Raises:
        ArtifactError: There is no such file, or it holds no latency table.
    """
    try:
        parquet = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = "not a Parquet file" if Path(path).exists() else "no such file"
        raise ArtifactError(
            f"latency table {path}: {reason}; make one with `cacp-ray latency measure`"
        ) from error
    try:
        about: dict[str, Any] = parse_json((parquet.schema.metadata or {})[KEY])
        if about["version"] != VERSION:
            raise ArtifactError(
                f"latency table {path} has version {about['version']}, this reads {VERSION}: "
                "measure it again"
            )
        about |= {
            "input_shape": tuple(about["input_shape"]),
            "settings": Settings(**about["settings"]),
            "calibration": Calibration(**about["calibration"]),
            "cells": tuple(_read_cell(row) for row in parquet.to_pylist()),
        }
        names = [field.name for field in dataclasses.fields(LatencyTable)]
        table = LatencyTable(**{name: about[name] for name in names})
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
