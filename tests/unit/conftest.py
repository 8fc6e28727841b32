"""What holds for all tests that need no cluster."""

import sys
from collections.abc import Iterator

import pytest


def has_ray() -> bool:
    """Whether this process is connected to a Ray."""
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@pytest.fixture(autouse=True)
def no_ray() -> Iterator[None]:
    """A test that starts a Ray belongs into tests/ray: here, each process would start one."""
    had_ray = has_ray()  # of tests/ray, in the process that ran them
    yield
    assert has_ray() == had_ray, "this test has started a Ray"
