"""A search by `ray job submit`, killed with its driver and submitted again.

Ray's job server is not part of a plain `pip install ray`: pip install 'ray[default]'.
"""

import subprocess
import sys
import time
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml

from cacp_ray.rundir.directory import RunDirectory
from tests.machines import RAY, free_port, running
from tests.ray.test_elastic import ASYNC

LONG = {
    "data": {"search": {"path": "embedded:search"}},
    "evaluation": {"images": 500},
}
MANY = 200  # evaluations, some twenty seconds longer than `ray job stop` takes

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def jobs():
    """A cluster with a job server, and what submits to it."""
    pytest.importorskip("aiohttp", reason="the job server needs pip install 'ray[default]'")
    server = f"127.0.0.1:{free_port()}"
    host, _, port = server.partition(":")
    dashboard = f"--dashboard-host={host}", f"--dashboard-port={port}"
    with running("--include-dashboard=true", *dashboard) as machines:
        machines.add_nodes(2)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                urlopen(f"http://{server}/api/version").close()
            except HTTPError:  # it answers: without the token it refuses
                break
            except OSError:
                time.sleep(0.5)
            else:
                break

        def call(what, *arguments, seconds=240):
            command = [*RAY, "job", what, "--address", f"http://{server}", *map(str, arguments)]
            return subprocess.run(
                command,
                env=machines.environment,
                capture_output=True,
                text=True,
                timeout=seconds,
                check=False,
            )

        yield call


def test_a_submitted_search_is_killed_and_submitted_again(jobs, tmp_path):
    config, folder = tmp_path / "small.yaml", tmp_path / "run"
    config.write_text(yaml.safe_dump(ASYNC | LONG | {"evaluations": MANY}))
    search = [sys.executable, "-m", "cacp_ray.cli", "search", config, "--address", "auto"]
    search += ["--run-dir", folder]
    begun = jobs("submit", "--no-wait", "--submission-id", "first", "--", *search)
    assert begun.returncode == 0, begun.stdout + begun.stderr
    journal = folder / "journal.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if journal.exists() and len(journal.read_text().splitlines()) >= 10:
            break
        time.sleep(0.2)
    stopped = jobs("stop", "first")
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    before = RunDirectory(folder).read_records()
    assert 10 <= len(before) < MANY, jobs("logs", "first").stdout

    again = jobs("submit", "--submission-id", "again", "--", *search, "--resume")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "report:" in again.stdout
    rows = RunDirectory(folder).read_records()
    assert {row.status for row in rows} == {"ok"}
    assert len({row.key for row in rows}) == MANY
    assert rows[: len(before)] == before
    # What ended in an error is an error to who submits.
    (folder / "config.yaml").write_text("name: [")
    failed = jobs("submit", "--submission-id", "failed", "--", *search, "--resume")
    assert failed.returncode != 0
    assert "config.yaml" in failed.stdout + failed.stderr
