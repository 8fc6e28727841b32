"""Statistics on disk, so that a later command reads what a search has collected.

The safetensors file holds the lower triangle of every symmetric matrix, in float32: statistics have
that precision from the start, so nothing is lost. Its key says what it was made of, and a file with
another key is not used.
"""

# pyright: basic
# Basic: safetensors has no types.

import errno
import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cacp_ray.io.files import parse_json, write_file
from cacp_ray.pruning.calibration import Calibration, update_hash
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.statistics import POSITIONS, GateGradients, InputMoments, Statistics

logger = logging.getLogger(__name__)

FORMAT = 1


def statistics_key(
    weights_sha256: str,
    plan: Plan,
    calibration: Calibration,
    *,
    seed: int,
    kinds: Iterable[str],
    positions: int = POSITIONS,
) -> str:
    """sha256 of all that `collect_statistics` depends on."""
    readers = [(c.weight, plan.axes[c.weight, 1].group.tolist()) for c in plan.consumers]
    sizes = [group.num_channels for group in plan.groups]
    settings = [FORMAT, weights_sha256, seed, sorted(kinds), positions, readers, sizes]
    digest = hashlib.sha256(json.dumps(settings).encode())
    update_hash(digest, calibration)
    return digest.hexdigest()


def save_statistics(path: Path, statistics: Statistics, key: str) -> None:
    """Writes a safetensors file with the key of `statistics_key`, whole or not at all."""
    arrays: dict[str, NDArray[np.float32]] = {}
    for name, moments in statistics.inputs.items():
        arrays[f"inputs/{name}/mean"] = moments.mean.astype(np.float32)
        arrays[f"inputs/{name}/covariance"] = _pack(moments.covariance)
        if moments.taps is not None:
            arrays[f"inputs/{name}/taps"] = _pack(moments.taps)
    for number, gate in enumerate(statistics.gates):
        arrays[f"gates/{number}/absolute"] = gate.absolute.astype(np.float32)
        arrays[f"gates/{number}/square"] = gate.square.astype(np.float32)
    order = json.dumps(list(statistics.inputs))
    metadata = {"key": key, "inputs": order, "gates": str(len(statistics.gates))}

    def write(temporary: Path) -> None:
        try:
            save_file(arrays, temporary, metadata)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error)) from error

    write_file(path, write)


def load_statistics(path: Path, key: str) -> Statistics | None:
    """What `save_statistics` wrote; None if the file is missing, damaged or has another key.

    Damage is logged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        inputs = {
            name: InputMoments(
                arrays[f"inputs/{name}/mean"].astype(np.float64),
                _unpack(arrays[f"inputs/{name}/covariance"]),
                None if taps is None else _unpack(taps).astype(np.float64),
            )
            for name in parse_json(metadata["inputs"])
            for taps in [arrays.get(f"inputs/{name}/taps")]
        }
        gates = tuple(
            GateGradients(
                arrays[f"gates/{number}/absolute"].astype(np.float64),
                arrays[f"gates/{number}/square"].astype(np.float64),
            )
            for number in range(int(metadata["gates"]))
        )
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        logger.warning("%s is damaged (%s): collecting the statistics anew", path, reason)
        return None
    return Statistics(inputs, gates)


def _pack(matrix: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
    """The lower triangle of a symmetric matrix (D, D), as (D * (D + 1) / 2,)."""
    return matrix[np.tri(len(matrix), dtype=bool)].astype(np.float32)


def _unpack(triangle: NDArray[np.float32]) -> NDArray[np.float32]:
    size = int((2 * len(triangle)) ** 0.5)
    lower = np.zeros((size, size), np.float32)
    lower[np.tri(size, dtype=bool)] = triangle
    return lower + np.tril(lower, -1).T
