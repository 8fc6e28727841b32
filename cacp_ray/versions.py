"""Installed versions of what a measurement depends on, which must be the same on every node."""

from collections.abc import Mapping
from importlib import metadata

from cacp_ray.errors import ConfigError

PACKAGES = ("cacp-ray", "torch", "torchvision", "numpy")


def installed_versions() -> dict[str, str]:
    """By the package's name."""
    return {name: metadata.version(name) for name in PACKAGES}


def check_versions(expected: Mapping[str, str]) -> None:
    """Refuses to measure here what is measured elsewhere with other packages.

    Args:
        expected: Of `installed_versions`, where the search runs.

    Raises:
        ConfigError: One is not the same.
    """
    found = installed_versions()
    for name, version in expected.items():
        if found[name] != version:
            raise ConfigError(
                f"{name} {found[name]} is installed there, {version} where the search runs: "
                "measurements would differ; start all nodes from the same image"
            )
