"""The machine that measures: installed versions, hardware, and this process's memory."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from cacp_ray.errors import ConfigError

Result = TypeVar("Result")

MEASURING_PACKAGES = ("cacp-ray", "torch", "torchvision", "numpy")
PACKAGES = ("cacp-ray", "torch", "torchvision", "ray", "numpy", "pyarrow")


def installed_versions() -> dict[str, str]:
    """Versions of the packages that a measurement depends on, by name."""
    return {name: metadata.version(name) for name in MEASURING_PACKAGES}


def with_same_versions(function: Callable[..., Result]) -> Callable[..., Result]:
    """A function to send elsewhere: it refuses to run with other packages than this process has.

    Nodes may join at any time, and what they measure must not differ.

    Raises:
        ConfigError: When called, a version differs.
    """
    expected = installed_versions()

    def run(*args: Any, **kwargs: Any) -> Result:
        for name, version in installed_versions().items():
            if expected[name] != version:
                raise ConfigError(
                    f"{name} {version} is installed there, {expected[name]} where the search runs: "
                    "measurements would differ; start all nodes from the same image"
                )
        return function(*args, **kwargs)

    return run


def describe_environment(seed: int) -> dict[str, Any]:
    """Versions, hardware, commit and seed: what a result needs besides its configuration."""
    return {
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": read_processor(),
        "cpus": os.cpu_count(),
        "commit": _read_commit(),
        "seed": seed,
    }


def read_processor() -> str:
    """Name of this machine's processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _read_commit() -> str | None:
    folder = Path(__file__).parent
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would include the parent of a new process
        line = next(row for row in status.read_text().splitlines() if row.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def give_back_memory() -> None:
    """Returns freed memory to the system, which glibc's allocator keeps where tensor sizes differ.

    Nothing happens with another C library.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
