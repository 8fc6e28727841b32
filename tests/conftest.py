"""Fixtures of all tests."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs on this machine, whatever RAY_ADDRESS says; for tests marked `ray`."""
    from cacp_ray.distributed import cluster

    cluster.connect("local", num_cpus=2)
    yield
    cluster.disconnect()
