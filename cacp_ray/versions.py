"""Installed versions of what a measurement depends on, which must be the same on every node."""

from importlib import metadata

PACKAGES = ("cacp-ray", "torch", "torchvision", "numpy")


def installed_versions() -> dict[str, str]:
    """By the package's name."""
    return {name: metadata.version(name) for name in PACKAGES}
