"""A cluster of real `ray start` processes: the command line joins it and asks its nodes first, a
driver that dies leaves no demand, and a search survives kills (slow)."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cacp_ray.rundir.directory import RunDirectory
from tests.machines import Machines, free_port, running
from tests.small import TINY

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ASYNC = TINY | {"mode": "async", "cluster": {"max_evaluators": 2}}

# Counts the actors that are alive or wanted, and the demand that an autoscaler would see.
COUNT = """
import sys
from cacp_ray.distributed import cluster
cluster.connect(sys.argv[1])
from ray._private.state import actors
from ray.autoscaler.v2.sdk import get_cluster_status
status = get_cluster_status(cluster.ray.get_runtime_context().gcs_address)
demand = [
    bundle.count
    for demand in status.resource_demands.ray_task_actor_demand
    for bundle in demand.bundles_by_count
]
print(sum(actor["State"] != "DEAD" for actor in actors().values()), sum(demand))
"""

# Runs the command line on a machine that must build no subnet itself.
IDLE = """
from cacp_ray.workflows import winners
from cacp_ray.cli import main

def refuse(*_, **__):
    raise AssertionError("the driver builds")

winners.Builder = refuse
main()
"""

# Asks for more evaluators than there is room for.
GREEDY = """
import sys, time
from cacp_ray.distributed import cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
cluster.connect(sys.argv[1])
pool = RayEvaluatorPool(RayActors(print, {}), num_evaluators=6, cpus_per_evaluator=1)
time.sleep(600)
"""


@pytest.fixture(scope="module")
def machines():
    with running() as machines:
        machines.add_nodes(1)
        wait_until_joined(machines, 1)  # nodes that start at once may choose the same ports
        yield machines


def run(machines: Machines, *command: str | Path, seconds: float = 240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env=machines.environment,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_auto_joins_the_cluster_of_this_machine_whose_head_scores_nothing(machines, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(ASYNC))
    folder = tmp_path / "run"
    search = ("-c", IDLE, "search", config, "--address", "auto", "--run-dir", folder)
    done = run(machines, *search)
    assert done.returncode == 0, done.stdout + done.stderr
    # It is 0 until the head has heard of the node's CPU.
    assert re.search(r"room for [01] now", done.stdout), done.stdout
    rows = RunDirectory(folder).read_records()
    assert [row.status for row in rows] == 4 * ["ok"]


def test_a_driver_that_dies_asks_for_nothing_more(machines):
    driver = subprocess.Popen(
        [sys.executable, "-c", GREEDY, machines.address], env=machines.environment
    )
    try:
        counts = wait_for(machines, lambda actors, demand: actors == 6 and demand > 0)
        assert counts[1] >= 5  # there is room for one
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert wait_for(machines, lambda actors, demand: actors == demand == 0) == (0, 0)


def wait_for(machines, is_so):
    deadline = time.monotonic() + 60
    while True:
        done = run(machines, "-c", COUNT, machines.address)
        assert done.returncode == 0, done.stderr
        actors, demand = map(int, done.stdout.split())
        if is_so(actors, demand) or time.monotonic() > deadline:
            return actors, demand
        time.sleep(1.0)


def fake_version(folder):
    (folder / "torch-1.0.0.dist-info").mkdir()
    text = "Metadata-Version: 2.1\nName: torch\nVersion: 1.0.0\n"
    (folder / "torch-1.0.0.dist-info" / "METADATA").write_text(text)


def broken_package(folder):
    (folder / "torchvision.py").touch()
    (folder / "torch.py").write_text("raise ImportError('libcuda.so.1 is missing')")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (fake_version, r"has torch 1.0.0, this machine"),
        (broken_package, r"cannot score (ImportError: libcuda.so.1 is missing)"),
    ],
)
def test_a_node_that_differs_is_named_before_anything_is_written(
    machines, tmp_path, spoil, message
):
    packages = tmp_path / "packages"
    packages.mkdir()
    spoil(packages)
    config = tmp_path / "small.yaml"
    config.write_text(yaml.safe_dump(ASYNC))
    folder = tmp_path / "run"
    search = ("-m", "cacp_ray.cli", "search", config, "--run-dir", folder)
    machines.add_nodes(1, PYTHONPATH=str(packages))
    try:
        wait_until_joined(machines, 2)
        done = run(machines, *search, "--address", machines.address)
    finally:
        machines.lose_node(1)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not folder.exists()


JOINED = """
import sys
from cacp_ray.distributed import cluster
from cacp_ray.distributed.nodes import read_nodes
cluster.connect(sys.argv[1])
here = sum(cpus > 0 for cpus in read_nodes().cpus.values())
print(here, len(cluster.ray.nodes()) - 1)  # without the head; nodes that have left count
"""


def read_joined(machines) -> tuple[int, int]:
    """Numbers of nodes with CPUs that are here, and that ever were."""
    here, ever = run(machines, "-c", JOINED, machines.address).stdout.split()
    return int(here), int(ever)


def wait_until_joined(machines, count):
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if read_joined(machines)[0] == count:
            return
        time.sleep(0.5)
    raise TimeoutError(f"{count} nodes with CPUs")


FAULTS = "--episodes 600 --score-seconds 0.5 --kill-seconds 5 --driver-kills 3"


def test_a_search_under_kills_measures_every_candidate_once():
    done = subprocess.run(
        [sys.executable, "bench/soak.py", *FAULTS.split()],
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["measurements"] == report["distinct"] == 600
    assert min(report["kills"].values()) > 0


# A node of two CPUs comes when asked for, and goes after six idle seconds. Ray's own
# AutoscalingCluster wraps the same provider, but first ends every Ray of the machine.
LISTS = (
    "cluster_synced_files",
    "rsync_exclude",
    "rsync_filter",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)
AUTOSCALING = {
    "cluster_name": "fake",
    "max_workers": 3,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
    "head_node_type": "ray.head.default",
    "upscaling_speed": 100.0,
    "idle_timeout_minutes": 0.1,
    **{key: {} for key in ("auth", "docker", "file_mounts")},
    **{key: [] for key in LISTS},
}


def test_an_autoscaler_brings_what_a_search_could_use_and_takes_it_back(tmp_path):
    file, config, folder = tmp_path / "cluster.yaml", tmp_path / "small.yaml", tmp_path / "run"
    port = free_port()
    provider = AUTOSCALING["provider"] | {"gcs_address": f"127.0.0.1:{port}"}
    file.write_text(json.dumps(AUTOSCALING | {"provider": provider}))
    small = ASYNC | {"cluster": {"max_evaluators": 3}, "evaluations": 12}
    config.write_text(yaml.safe_dump(small))
    options = ("--include-dashboard=false", f"--autoscaling-config={file}")
    fake = {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    with running(*options, port=port, **fake) as machines:
        address = machines.address
        search = ("-m", "cacp_ray.cli", "search", config, "--run-dir", folder)
        done = run(machines, *search, "--address", address)
        assert done.returncode == 0, done.stdout + done.stderr
        rows = RunDirectory(folder).read_records()
        assert [row.status for row in rows] == 12 * ["ok"]
        # Three evaluators of one CPU need two nodes, although a third could come.
        deadline = time.monotonic() + 90
        while True:
            here, ever = read_joined(machines)
            if here == 0 or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert (here, ever) == (0, 2)
