"""One finished search for all tests that only read it."""

import pytest

import cacp_ray
from tests.small import SMALL


@pytest.fixture(scope="session")
def finished(ray_cluster, tmp_path_factory):
    """A finished run of `SMALL`; its cache is beside it. Tests that change it take a copy."""
    folder = tmp_path_factory.mktemp("search") / "run"
    return cacp_ray.search(SMALL, folder, cache=folder.parent / "cache")
