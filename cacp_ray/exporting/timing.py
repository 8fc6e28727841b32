"""Times networks and single layers in the runtime that deploys them, by their ONNX files."""

import re
import shlex
import subprocess
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from cacp_ray.errors import ConfigError, EvaluationError, first_line
from cacp_ray.evaluation.latency import Networks, Timer, measure_passes, torch_timer
from cacp_ray.evaluation.latency_table import COMMAND, TORCH, Settings
from cacp_ray.exporting.formats import FORMATS
from cacp_ray.exporting.onnx_files import read_onnx
from cacp_ray.exporting.openvino_files import read_openvino

LIMIT = 600.0  # seconds that a command may take for one file
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?")
READERS = {"onnxruntime": read_onnx, "openvino": read_openvino}
PACKAGES = {"onnxruntime": FORMATS["onnx"], "openvino": FORMATS["openvino"]}


def make_timer(settings: Settings) -> Timer:
    """What times networks as the settings say.

    Raises:
        ConfigError: The runtime is not installed.
    """
    if settings.runtime == TORCH:
        return torch_timer(settings.clock)
    if settings.runtime == COMMAND:
        assert settings.command is not None
        return partial(_time_by_command, settings.command)
    kind = PACKAGES[settings.runtime]
    if missing := kind.missing_packages():
        raise ConfigError(
            f"runtime {settings.runtime} needs {', '.join(missing)}: pip install "
            f"'cacp-ray[{kind.extra}]'"
        )
    return partial(_time_in_runtime, settings)


def _time_in_runtime(
    settings: Settings, networks: Networks, least: int, most: int, seconds: float
) -> list[list[float]]:
    passes: dict[str, Callable[[], object]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for index, (net, x) in enumerate(networks):
            file = Path(folder) / f"{index}.onnx"
            write_quickly(net, x, file)
            # Each reader counts torch's threads, which the caller has set.
            passes[str(index)] = partial(READERS[settings.runtime](file, net), x)
        measured = measure_passes(
            passes, repeats=most, warmup=1, seconds=seconds, clock=settings.clock, least=least
        )
    return [list(latency.rounds_ms) for latency in measured.values()]


def _time_by_command(
    command: str, networks: Networks, least: int, most: int, seconds: float
) -> list[list[float]]:
    """Runs the command once a network: it repeats and takes the median by itself."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "network.onnx"
        times: list[list[float]] = []
        for net, x in networks:
            write_quickly(net, x, file)
            times.append([run_command(command, file)])
        return times


def run_command(command: str, file: Path) -> float:
    """Milliseconds of a pass: the last number that a program prints about an ONNX file.

    Raises:
        ConfigError: The program is not found, fails, takes too long, or prints no number.
    """
    try:
        done = subprocess.run(
            [*shlex.split(command), str(file)], capture_output=True, text=True, check=False,
            timeout=LIMIT,
        )  # fmt: skip
    except ValueError as error:  # quotes that do not close
        raise ConfigError(f"--command {command}: {error}") from error
    except OSError as error:
        raise ConfigError(f"--command {command}: {error.strerror or error}") from error
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"--command {command}: no answer within {LIMIT:.0f} s for one file"
        ) from error
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ConfigError(f"--command {command}: exit code {done.returncode} ({reason[:200]})")
    numbers = _NUMBER.findall(done.stdout)
    milliseconds = float(numbers[-1]) if numbers else 0.0
    if not 0 < milliseconds < float("inf"):
        raise ConfigError(
            f"--command {command}: it printed no number of milliseconds above 0 "
            f"(but: {' '.join(done.stdout.split())[:100]})"
        )
    return milliseconds


def write_quickly(net: nn.Module, x: Tensor, path: Path) -> None:
    """Writes an ONNX file of fixed shapes by the older exporter, which takes a tenth of a second.

    Raises:
        EvaluationError: It cannot follow the network.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                net, (x,), str(path), dynamo=False, input_names=["image"], verbose=False
            )
    except Exception as error:
        raise EvaluationError(
            f"torch.onnx cannot follow the network ({first_line(error)[:200]}): measure with "
            "--runtime torch"
        ) from error
