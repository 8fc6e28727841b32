"""Networks of a run as they are deployed: score, file size and latency by format and batch size.

All networks are timed in turn, in one sitting, so that they can be compared with each other.
"""

import copy
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp_ray.config.saved import is_run, read_run_config
from cacp_ray.errors import ArtifactError, CacpError, ConfigError, first_line, nearest_names
from cacp_ray.evaluation.latency import Latency, measure_passes, speedup, use_threads
from cacp_ray.exporting.formats import FORMATS
from cacp_ray.exporting.source import Arguments, FileNetwork, Network, Source
from cacp_ray.exporting.subnet import compare
from cacp_ray.io.environment import describe_environment
from cacp_ray.models.factory import GIVEN
from cacp_ray.pruning.arguments import describe_inputs, make_inputs, read_arguments
from cacp_ray.pruning.inputs import call, map_inputs
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.pruning.torch_types import as_channels_last
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.schema import ReportedFile
from cacp_ray.workflows.export import quantization
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.setup import Setup

logger = logging.getLogger(__name__)

TORCH = "torch"  # the network itself, in float32
BENCHMARKED = (TORCH, "onnx", "onnx-int8", "openvino", "openvino-int8")
REPEATS = 100  # rounds at most


@dataclass(frozen=True)
class Deployed:
    """A network in one format.

    Attributes:
        network: `base`, or the rate of a subnet.
        format: Its format.
        size: Bytes of its files, or of its weights in PyTorch.
        score: Score on the search split.
        run: Runs it.
    """

    network: str
    format: str
    size: int
    score: float
    run: Network

    @property
    def name(self) -> str:
        """What tells it from the others."""
        return f"{self.network} {self.format}"


def benchmark(
    places: Sequence[Path],
    *,
    formats: Sequence[str] | None = None,
    batches: Sequence[int] = (1, 64),
    threads: int = 1,
    seconds: float = 60.0,
    given: Given | None = None,
) -> dict[str, Any]:
    """Exports the networks of a run into a temporary folder, scores and times them.

    Args:
        places: A run directory, for all its subnets, or subnet folders of one run. The base network
            is measured with them.
        formats: Of `BENCHMARKED`; by default all whose packages are installed.
        batches: Examples in a pass, each 1 or more.
        threads: Threads of every runtime.
        seconds: Time for the passes of each batch size.
        given: Network and task of a search that was given them as objects.

    Returns:
        `rows`, one a network and format, with `latency` by batch size, and what they were measured
        on.

    Raises:
        ConfigError: A format is unknown or its package is missing; a batch size, or places of
            several runs.
        ArtifactError: A place holds no finished run, or no subnet of one.
        UnsupportedModelError, EvaluationError: A network cannot be exported, or its file does not
            run.
    """
    chosen = check_formats(formats)
    if not batches or min(batches) < 1 or threads < 1:
        raise ConfigError("--batch and --threads: give whole numbers of 1 or more, as 1,64")
    run_dir, folders = find_subnets(places)
    config = read_run_config(run_dir)
    setup = Setup.create(config, run_dir, given)
    whole = setup.model if config.model.name.startswith(GIVEN) else None
    nets = {"base": setup.model} | {
        network: load_subnet(folder, trust=True, model=whole) for network, folder in folders.items()
    }
    arguments = read_arguments(
        {"input_shape": setup.plan.input_shape, **describe_inputs(setup.inputs)}
    )
    if not all(argument.is_batch for argument in arguments):
        raise ConfigError("inputs of this network have no batch, whose size a benchmark varies")
    with tempfile.TemporaryDirectory() as temporary, use_threads(threads), torch.no_grad():
        deployed = [
            each
            for network, net in nets.items()
            for each in _deploy(network, net, chosen, arguments, setup, Path(temporary))
        ]
        latencies = {
            batch: _measure(deployed, arguments, batch, seconds) for batch in sorted(set(batches))
        }
    first = deployed[0]
    rows = [_as_row(each, first, latencies) for each in deployed]
    return {
        "name": read_result(run_dir, ReportedFile)["name"],
        "metric": vars(setup.task.metric),
        "images": len(setup.task),
        "threads": threads,
        "weights": {network: _weights(folder) for network, folder in folders.items()},
        "reference": {"network": first.network, "format": first.format},
        "rows": rows,
        "environment": describe_environment(config.seed),
    }


def check_formats(formats: Sequence[str] | None) -> list[str]:
    """The formats to measure, in the order given.

    Raises:
        ConfigError: One is unknown or needs a package that is not installed.
    """
    chosen: list[str] = []
    for name in dict.fromkeys(BENCHMARKED if formats is None else formats):
        if name not in BENCHMARKED:
            raise ConfigError(f"unknown format {name!r}: {nearest_names(name, BENCHMARKED)}")
        kind = FORMATS.get(name)
        missing = kind.missing_packages() if kind else []
        if missing and formats is not None and kind is not None:
            raise ConfigError(
                f"format {name} needs {', '.join(missing)}: pip install 'cacp-ray[{kind.extra}]'"
            )
        if not missing:
            chosen.append(name)
    if not chosen:
        raise ConfigError(f"no format to measure: choose of {', '.join(BENCHMARKED)}")
    return chosen


def find_subnets(places: Sequence[Path]) -> tuple[Path, dict[str, Path]]:
    """The run of all places, and their subnet folders by rate, the largest first.

    Raises:
        ConfigError: Places of several runs.
        ArtifactError: A place holds no finished run, or no subnet of one.
    """
    runs: set[Path] = set()
    folders: dict[str, Path] = {}
    for place in places:
        if (place / "subnet.json").exists():
            run_dir = place.resolve().parent.parent
            if not is_run(run_dir):
                raise ArtifactError(
                    f"{place} lies in no run, whose images score it: put it into the `subnets` of "
                    "its run"
                )
            runs.add(run_dir)
            folders[f"{read_description(place, 'rate')['rate']:g}"] = place
            continue
        rows = read_result(place, ReportedFile)["rates"]
        runs.add(place.resolve())
        folders |= {f"{row['rate']:g}": place / row["path"] for row in rows}
    if len(runs) != 1:
        raise ConfigError("a benchmark is of one run: give one run directory, or subnets of one")
    return runs.pop(), dict(sorted(folders.items(), key=lambda item: -float(item[0])))


def _weights(folder: Path) -> str:
    return "finetuned" if (folder / "finetuned.safetensors").exists() else "search"


def _deploy(
    network: str,
    net: nn.Module,
    formats: Sequence[str],
    arguments: Arguments,
    setup: Setup,
    folder: Path,
) -> Iterator[Deployed]:
    """The network in every format; files with another output than it has are refused."""
    net = copy.deepcopy(net).float().eval().requires_grad_(False)
    float_score = setup.task.measure(copy.deepcopy(net)).score
    int8 = quantization(setup)
    for name in formats:
        logger.info("preparing %s, %s", network, name)
        if name == TORCH:
            small = as_channels_last(copy.deepcopy(net))
            size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
            yield Deployed(network, name, size, float_score, partial(call, small))
            continue
        kind = FORMATS[name]
        source = Source(net, arguments, json.dumps({}), int8.calibration if kind.is_int8 else ())
        path = folder / f"{network}{kind.suffix}"
        try:
            kind.write(source, path)
            run = kind.read(path, net)
            if kind.is_int8:
                score = int8.measure(FileNetwork(run, source))
            else:
                compare(net, run, arguments)
                score = float_score
        except CacpError as error:
            raise type(error)(f"{network} as {name}: {error}") from error
        except Exception as error:  # a runtime that lacks an operation
            raise ConfigError(
                f"{network} as {name} does not run here ({type(error).__name__}: "
                f"{first_line(error)[:200]}): leave {name} out of --format"
            ) from error
        files = [path, *([path.with_suffix(kind.beside)] if kind.beside else [])]
        yield Deployed(network, name, sum(f.stat().st_size for f in files), score, run)


def _measure(
    deployed: Sequence[Deployed], arguments: Arguments, batch: int, seconds: float
) -> dict[str, Latency]:
    """Latency of each network and format, by name."""
    logger.info("timing %d networks, batch %d", len(deployed), batch)
    inputs = make_inputs(arguments, batch, torch.Generator().manual_seed(0))
    last = map_inputs(
        lambda x: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x, inputs
    )
    passes: Mapping[str, Callable[[], object]] = {
        each.name: partial(each.run, last if each.format == TORCH else inputs) for each in deployed
    }
    with torch.inference_mode():
        return measure_passes(passes, repeats=REPEATS, seconds=seconds)


def _as_row(
    each: Deployed, first: Deployed, latencies: Mapping[int, Mapping[str, Latency]]
) -> dict[str, Any]:
    timed = [
        {
            "batch": batch,
            "median_ms": measured[each.name].median_ms,
            "quartiles_ms": list(measured[each.name].quartiles_ms),
            "speedup": speedup(measured[first.name], measured[each.name]),
            "rounds": len(measured[each.name].rounds_ms),
        }
        for batch, measured in latencies.items()
    ]
    return {
        "network": each.network,
        "format": each.format,
        "size": each.size,
        "score": each.score,
        "latency": timed,
    }
