"""The command line. Each command loads, calls the library once, and prints."""

from cacp_ray.cli import data, networks, results, searching  # their commands
from cacp_ray.cli.app import app, main

__all__ = ["app", "data", "main", "networks", "results", "searching"]
