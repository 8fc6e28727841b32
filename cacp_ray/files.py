"""Files that are whole or absent: everything is written to a temporary name, then renamed."""

import json
import logging
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cacp_ray.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
RETRY_SECONDS = 1.0


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path beside `path`, then renames the result to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def keep_trying(write: Callable[[], object], where: Path) -> None:
    """Repeats a write that the storage refuses, for up to two minutes.

    Args:
        write: Leaves nothing behind where it fails.
        where: Named in the warning and the error.

    Raises:
        ArtifactError: The storage still refuses.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    has_warned = False
    while True:
        try:
            write()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"{where} cannot be written ({reason}): free or mend the storage, then go on "
                    "with --resume"
                ) from error
            if not has_warned:
                logger.warning("%s cannot be written (%s): tried again and again", where, reason)
                has_warned = True
            time.sleep(RETRY_SECONDS)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; NaN is an error."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_file(path, lambda temporary: temporary.write_text(text))


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Writes detached copies as safetensors, readable as any other file."""
    from safetensors.torch import save  # save_file would make the file private

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_file(path, lambda temporary: temporary.write_bytes(save(plain)))


def write_yaml(path: Path, value: Any) -> None:
    """Writes YAML in the order of the keys."""
    text = yaml.safe_dump(value, sort_keys=False)
    write_file(path, lambda temporary: temporary.write_text(text))


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ArtifactError: It is missing or cannot be read.
    """
    try:
        return path.read_text()
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; is this the right folder?") from error


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ArtifactError: The file is missing or is not JSON.
    """
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not valid JSON ({error}); restore it from a copy, or start in a new folder"
        ) from error


def read_object(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """Reads a JSON object that must have these keys.

    Raises:
        ArtifactError: As of `read_json`, or it is something else.
    """
    return check_object(path, read_json(path), keys)


def check_object(path: Path, value: Any, keys: Iterable[str]) -> dict[str, Any]:
    """The content of a file, where it is a JSON object that has these keys.

    Raises:
        ArtifactError: It is something else.
    """
    lacks = sorted(set(keys) - (value.keys() if isinstance(value, dict) else set()))
    if lacks or not isinstance(value, dict):
        what = f"no {', '.join(lacks)} in it" if isinstance(value, dict) else "no JSON object"
        raise ArtifactError(f"{path}: {what}; restore it from a copy, or make it anew")
    return value


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions, hardware, commit and seed: what a result needs beside its configuration."""
    packages = ("cacp-ray", "torch", "torchvision", "ray", "numpy", "pyarrow")
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in packages},
        "platform": platform.platform(),
        "processor": read_processor(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
        "seed": seed,
    }


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says of a new process there includes its parent's
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def read_processor() -> str:
    """The name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _commit() -> str | None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Key paths whose values differ between two resolved configurations."""
    keys: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(prefix + key)
    return keys
