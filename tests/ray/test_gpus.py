"""Evaluators with shares of GPUs beside evaluators without, on nodes that say they have GPUs.

No process computes on one: what is tried is who is placed where, and what each is told.
"""

import json
import os
import subprocess
import sys

import pytest
import ray

from cacp_ray.distributed import room
from cacp_ray.distributed.cluster import check_room
from cacp_ray.distributed.nodes import Nodes
from cacp_ray.distributed.slots import Kind
from cacp_ray.errors import ConfigError

pytestmark = pytest.mark.ray

DRIVER = """
import json, os, time
from ray.cluster_utils import Cluster
import ray
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.distributed.room import find_room
from cacp_ray.evaluation.measurement import Candidate
from tests.ray.test_gpus import make_told

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=2, num_gpus=1)
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

def as_list(room):
    return [room.gpu_share, room.on_gpus, room.on_cpus, room.now, room.device]

rooms = {
    "all": as_list(find_room(1, 0.5, None, 100)),
    "CPUs end first": as_list(find_room(1, 0.25, None, 100)),
    "no GPU": as_list(find_room(1, 0.0, None, 100)),
    "wanted": as_list(find_room(1, 0.5, 7, 100)),
    "few useful": as_list(find_room(1, 0.5, None, 1)),
}
pool = RayEvaluatorPool(
    make_told, {"top1": 0.25}, num_evaluators=1, cpus_per_evaluator=1, num_gpu_evaluators=2,
    gpus_per_evaluator=0.5, most=100,
)

def score(count):
    for index in range(count):
        pool.submit(Candidate(index, 0.5, (1,)))
    found = []
    while len(found) < count:
        found += pool.results(60.0)
    return sorted([each.evaluator, each.loss, each.top1] for each in found)

while pool.num_alive < 3:
    pool.results(0.1)
    time.sleep(0.1)
first = score(12)
cluster.add_node(num_cpus=2, num_gpus=1)
deadline = time.monotonic() + 90
while pool.num_alive < 5 and time.monotonic() < deadline:
    pool.results(0.1)
    time.sleep(0.1)
later = score(20)
pool.close()
ray.shutdown()
cluster.shutdown()
print(json.dumps([rooms, first, later]))
"""


def make_told(top1, gpu=0.0):
    """The share as the loss; 100 where Ray gave the process no GPU that it was told of."""
    import os
    import time

    from cacp_ray.evaluation.measurement import Measurement

    is_given = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def score(candidate):
        time.sleep(0.05)
        return Measurement(candidate.index, top1, 1.0, gpu if is_given == (gpu > 0) else 100, 1, 0)

    return score


@pytest.mark.parametrize(
    ("cpus", "gpus", "share", "room"),
    [(8, 1, 0.25, 4), (2, 1, 0.25, 2), (16, 2, 0.6, 2), (16, 5, 0.4, 10), (8, 0, 0.5, 0)],
)
def test_a_share_is_never_across_two_gpus(cpus, gpus, share, room):
    nodes = Nodes({"a": cpus}, {"a": gpus}, frozenset())
    assert Kind(1, share).room(nodes, "a") == room
    assert Kind(1).room(nodes, "a") == cpus


def test_a_gpu_is_asked_for_where_a_cluster_has_none_yet(monkeypatch):
    monkeypatch.setattr(room, "read_nodes", lambda: Nodes({"a": 4.0}, {"a": 0.0}, frozenset()))
    monkeypatch.setattr(room.ray, "available_resources", lambda: {"CPU": 4.0})
    found = room.find_room(1, 0.25, None, 100)
    assert (found.on_gpus, found.on_cpus, found.device) == (1, 4, "cuda and cpu")


@pytest.mark.usefixtures("ray_cluster")
def test_a_share_of_no_gpu_is_refused_on_this_machine():
    if any(node["Resources"].get("GPU") for node in ray.nodes()):
        pytest.skip("a GPU is there")
    with pytest.raises(ConfigError, match=r"0\.25 GPUs .* there are 0 on this machine: lower it"):
        check_room(1, 0.25, "local")


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_can_never_run_at_once_are_refused_on_this_machine():
    check_room(1, 0, "local", actors=2)
    with pytest.raises(ConfigError, match=r"4 CPUs at once .*trials.workers.* there are 2"):
        check_room(1, 0, "local", actors=4, asked_by="trials.workers")


def test_gpu_nodes_get_evaluators_with_shares_and_others_get_plain_ones():
    done = subprocess.run(
        [sys.executable, "-c", DRIVER],
        env={name: text for name, text in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rooms, first, later = json.loads(done.stdout.splitlines()[-1])
    assert rooms == {
        "all": [0.5, 2, 1, 3, "cuda and cpu"],
        "CPUs end first": [0.25, 2, 1, 3, "cuda and cpu"],
        "no GPU": [0.0, 0, 3, 3, "cpu"],
        "wanted": [0.5, 7, 0, 2, "cuda"],
        "few useful": [0.5, 1, 0, 3, "cuda and cpu"],
    }
    told = {(name, share) for name, share, _ in first}
    assert told == {("evaluator-0", 0.5), ("evaluator-1", 0.5), ("evaluator-2", 0.0)}
    assert all(top1 == 0.25 for _, _, top1 in first)
    shares = {name: share for name, share, _ in later}
    assert sorted(shares.values()) == [0.0, 0.5, 0.5, 0.5, 0.5]
