"""Evaluators with and without shares of GPUs, on nodes that claim to have GPUs.

No process computes on a GPU: the tests try where evaluators are placed and what each is told.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import ray

from cacp_ray.distributed.cluster import check_room
from cacp_ray.distributed.gpus import measure_on_gpus
from cacp_ray.errors import ConfigError, EvaluationError
from tests.small import measurement_of

pytestmark = pytest.mark.ray

DRIVER = """
import json, os, time
from ray.cluster_utils import Cluster
import ray
from cacp_ray.distributed import building
from cacp_ray.distributed.gpus import measure_on_gpus
from cacp_ray.distributed.nodes import find_room, find_share, read_free, read_nodes
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.evaluation.gpu import Need
from cacp_ray.workflows.evaluators import describe_needs
from cacp_ray.evaluation.measurement import Candidate
from tests.ray.test_gpus import fail_there, make_told, tell_need, tell_process

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
cluster.add_node(num_cpus=2, num_gpus=1)
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")

def is_running(process):
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{process}") and time.monotonic() < deadline:
        time.sleep(0.1)
    return os.path.exists(f"/proc/{process}")

def as_list(room):
    return [room.gpu_share, room.on_gpus, room.on_cpus, room.now, room.device]

needs = measure_on_gpus(tell_need, {"gigabytes": 3, "of": 8}, 1)
told_needs = [
    [need.evaluator, need.gpu, bool(given), is_running(process)]
    for need, given, process in needs.values()
]
share = find_share({node: need for node, (need, *_) in needs.items()}, read_nodes(), 1)
measured_room = as_list(find_room(read_nodes(), read_free(), 1, share, None, 100))
try:
    measure_on_gpus(fail_there, {}, 1)
except ConfigError as error:
    fault = str(error)
building._build = tell_process
processes = building.build_on_nodes([()] * 3, 0, 0, {}, cpus=1, gpus=0.5)
built = [is_running(process) for process in processes]
pool = RayEvaluatorPool(
    RayActors(make_told, {"share": 0.25}), num_evaluators=1, cpus_per_evaluator=1,
    num_gpu_evaluators=2, gpus_per_evaluator=0.5, most=100,
)

def score(count):
    for index in range(count):
        pool.submit(Candidate(0.5, (1,), index=index))
    measured = []
    while len(measured) < count:
        measured += pool.results(60.0)
    return sorted([m.evaluator, m.loss, m.score] for m in measured)

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
print(json.dumps([[told_needs, measured_room, fault, built], first, later]))
"""


def make_told(share, gpu=0.0):
    """Reports the share as the loss; 100 if Ray gave the process no GPU that it was told of."""
    import os
    import time

    is_given = bool(os.environ.get("CUDA_VISIBLE_DEVICES"))

    def score(candidate):
        time.sleep(0.05)
        return measurement_of(
            candidate.index, share, 1.0, gpu if is_given == (gpu > 0) else 100, 1, 0
        )

    return score


def tell_need(gigabytes, of):
    """Returns a need, the GPU that Ray gave, and the process."""
    import os

    from cacp_ray.evaluation.gpu import Need

    return Need(gigabytes, of), os.environ.get("CUDA_VISIBLE_DEVICES"), os.getpid()


def fail_there():
    raise EvaluationError("torch cannot use one")


def tell_process(*arguments):
    import os

    return os.getpid()


@pytest.mark.usefixtures("ray_cluster")
def test_where_no_node_has_a_gpu_nothing_is_measured():
    if any(node["Resources"].get("GPU") for node in ray.nodes()):
        pytest.skip("a GPU is there")
    assert measure_on_gpus(fail_there, {}, 1) == {}


@pytest.mark.usefixtures("ray_cluster")
def test_a_share_of_no_gpu_is_refused_on_this_machine():
    if any(node["Resources"].get("GPU") for node in ray.nodes()):
        pytest.skip("a GPU is there")
    with pytest.raises(ConfigError, match=r"0\.25 GPUs .* there are 0 on this machine: lower it"):
        check_room(1, 0.25, "local")
    check_room(1, "auto", "local")


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_can_never_run_at_once_are_refused_on_this_machine():
    check_room(1, 0, "local", actors=2)
    with pytest.raises(ConfigError, match=r"4 CPUs at once .*trials.workers.* there are 2"):
        check_room(1, 0, "local", actors=4, asked_by="trials.workers")


@pytest.mark.slow
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
    measured, first, later = json.loads(done.stdout.splitlines()[-1])
    needs, room, fault, built = measured
    assert needs == [[3, 8, True, False]]
    assert room == [0.5, 2, 1, 3, "cuda and cpu"]  # the GPU is there to be shared
    assert re.match(
        r"nothing can be measured on a GPU of node [0-9.]+: .*cannot use one; mend", fault
    )
    assert built == [False] * 3  # processes, which would keep a GPU's memory
    told = {(name, share) for name, share, _ in first}
    assert told == {("evaluator-0", 0.5), ("evaluator-1", 0.5), ("evaluator-2", 0.0)}
    assert all(score == 0.25 for _, _, score in first)
    shares = {name: share for name, share, _ in later}
    assert sorted(shares.values()) == [0.0, 0.5, 0.5, 0.5, 0.5]
