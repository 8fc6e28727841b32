"""The command line. Each command loads, calls the library once, and prints."""

from cacp_ray.cli import data, latency, networks, results, searching  # each adds commands
from cacp_ray.cli.app import app, main

__all__ = ["app", "data", "latency", "main", "networks", "results", "searching"]
