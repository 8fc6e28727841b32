"""What `python -m cacp_ray.cli` runs."""

from cacp_ray.cli import main

main()
