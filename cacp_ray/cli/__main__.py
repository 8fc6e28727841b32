"""Runs the command line for `python -m cacp_ray.cli`."""

from cacp_ray.cli import main

main()
