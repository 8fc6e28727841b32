"""A driver uses a real cluster with a token and without, or says in one line what differs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests import machines

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TOKEN, ANOTHER = "2" * 64, "1" * 64
DRIVER = """
import sys
import ray
from cacp_ray.distributed import cluster
from cacp_ray.errors import ConfigError

class Adder:
    def add(self, numbers):
        return sum(numbers)

try:
    cluster.connect(sys.argv[1])
except ConfigError as error:
    print(error)
    sys.exit(2)
# Calls of the cluster to the driver fail where the two disagree.
adder = ray.remote(Adder).options(num_cpus=1, max_restarts=-1, max_task_retries=0).remote()
print(ray.get(adder.add.remote(ray.put([1, 2])), timeout=60))
"""


@pytest.fixture(scope="module", params=["token", "disabled"])
def cluster_mode(request, tmp_path_factory):
    """A cluster of two processes of `ray start`, and whether it asks for a token."""
    home = tmp_path_factory.mktemp("home")  # without a token file, whatever this machine has
    variables = {"RAY_AUTH_MODE": request.param, "RAY_AUTH_TOKEN": TOKEN, "HOME": str(home)}
    with machines.running(**variables) as running:
        running.add_nodes(1, **variables)
        yield running, request.param


@pytest.mark.parametrize("file", [None, TOKEN, ANOTHER], ids=["no file", "file", "another file"])
@pytest.mark.parametrize("mode", [None, "token", "disabled"])
def test_a_driver_uses_the_cluster_or_says_what_differs(cluster_mode, mode, file, tmp_path):
    running, cluster = cluster_mode
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text(file)
    variables = {
        name: value
        for name, value in running.environment.items()
        if not name.startswith("RAY_AUTH_")
    }
    variables |= {"HOME": str(tmp_path), "PYTHONPATH": str(Path.cwd())}
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, running.address],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env=variables | ({"RAY_AUTH_MODE": mode} if mode else {}),
    )
    if cluster == "disabled":
        is_used, says = mode != "token", "asks for no token, but RAY_AUTH_MODE=token is set here"
    else:
        is_used = mode != "disabled" and file == TOKEN
        says = "another token" if file == ANOTHER else "this machine has none"
        says = "but RAY_AUTH_MODE=disabled is set here" if mode == "disabled" else says
    assert result.returncode == (0 if is_used else 2), result.stderr
    assert result.stderr == ""
    assert says in result.stdout if not is_used else result.stdout == "3\n"
    assert len(result.stdout.splitlines()) == 1
