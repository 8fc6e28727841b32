"""Fixtures of all tests."""

import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from xdist.scheduler.loadfile import LoadFileScheduling

from cacp_ray.cli import main

# Ray's workers would wait for the other tests, which run at the usual priority.
os.environ.setdefault("RAY_worker_niceness", "0")


class _Scheduling(LoadFileScheduling):
    """A file stays on one process, for its fixtures, and so do all files that need a Ray."""

    def _split_scope(self, nodeid: str) -> str:
        return "ray" if nodeid.startswith("tests/ray/") else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> _Scheduling:
    """Side by side, tests are shared out as said above."""
    return _Scheduling(config, log)


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A Ray of two CPUs on this machine, whatever RAY_ADDRESS says, for tests marked `ray`."""
    from cacp_ray.distributed import cluster

    cluster.connect("local", num_cpus=2)
    yield
    cluster.disconnect()


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command line in this process; returns exit code, standard output and error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["cacp-ray", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return caught.value.code, *capsys.readouterr()

    level = logging.getLogger("cacp_ray").level  # the command line sets it
    yield call
    logging.getLogger("cacp_ray").setLevel(level)


@pytest.fixture(autouse=True)
def same_threads() -> Iterator[None]:
    """Gives torch its threads back: sums, and so the last digits, depend on their number."""
    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    yield
    if torch is not None:
        torch.set_num_threads(before)
