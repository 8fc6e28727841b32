"""A pool whose nodes come and go, on a Ray cluster of several nodes in a process of its own."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

from tests.small import measurement_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

START = """
import json, sys, time
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from cacp_ray.distributed import fleet
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate
from tests.ray.test_nodes import make_slow

def wait(is_so, seconds=60):
    started = time.monotonic()
    while not is_so() and time.monotonic() < started + seconds:
        pool.results(0.05)
        time.sleep(0.05)
    return time.monotonic() - started

def num_actors():
    return sum(actor["State"] != "DEAD" for actor in actors().values())

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
"""

END = """
pool.close()
ray.shutdown()
cluster.shutdown()
print(json.dumps(outcome))
"""

ALONE = """
fleet.MAX_RETRY_DELAY_S = 50.0
node = cluster.add_node(num_cpus=2)
pool = RayEvaluatorPool(
    RayActors(make_slow, {"seconds": 0.0}), num_evaluators=2, cpus_per_evaluator=1, most=3
)
wait(lambda: pool.num_alive == 2)
fleet.WITHDRAW_S = 4.0
for slot in pool._fleet.slots:
    slot.num_crashes = 6  # as after minutes without a node: tried again after 50 s
cluster.remove_node(node)
withdrawn = wait(lambda: len(pool._fleet.slots) == 1)
time.sleep(3)
pool.results(0.0)
left = len(pool._fleet.slots), num_actors()
cluster.add_node(num_cpus=1)
back = wait(lambda: pool.num_alive == 1, 100)
cluster.add_node(num_cpus=8)
wait(lambda: pool.num_alive == 3)
outcome = {"withdrawn": withdrawn, "left": left, "back": back, "most": len(pool._fleet.slots)}
"""

LOST = """
node = cluster.add_node(num_cpus=1)
pool = RayEvaluatorPool(
    RayActors(make_slow, {"seconds": 2.0}), num_evaluators=1, cpus_per_evaluator=1, max_attempts=2
)
pool.submit(Candidate(0.5, (1,), index=0))
measurements = []
for life in range(3):
    wait(lambda: pool._flights)
    cluster.remove_node(node)
    wait(lambda: not pool._flights)
    node = cluster.add_node(num_cpus=1)
while not measurements:
    measurements += pool.results(10.0)
outcome = {"status": measurements[0].status, "attempt": measurements[0].attempt}
"""

SPLITS = """
from pathlib import Path
from cacp_ray.distributed.probe import probe_nodes
from cacp_ray.errors import ConfigError
from tests.ray.test_nodes import draw, make_seen
for _ in range(2):
    cluster.add_node(num_cpus=1)
pool = RayEvaluatorPool(
    RayActors(make_seen, {"split": draw()}), num_evaluators=2, cpus_per_evaluator=1
)
wait(lambda: pool.num_alive == 2)
for index in range(12):
    pool.submit(Candidate(0.5, (1,), index=index))
measurements = []
while len(measurements) < 12:
    measurements += pool.results(10.0)
nodes = {slot.node for slot in pool._fleet.slots}
outcome = {"nodes": len(nodes), "seen": [m.score for m in measurements]}
probe_nodes([Path(".")])
try:
    probe_nodes([Path("nowhere")])
except ConfigError as error:
    outcome["fault"] = str(error)
"""
SPLIT = {"path": "embedded:train", "images_per_class": 3, "seed": 5}

WATCHED = """
import subprocess
from cacp_ray.distributed.nodes import read_nodes
from tests.unit.distributed.test_spot import gcp, metadata

kept, taken = cluster.add_node(num_cpus=1), cluster.add_node(num_cpus=1)
pool = RayEvaluatorPool(
    RayActors(make_slow, {"seconds": 0.0}), num_evaluators=2, cpus_per_evaluator=1
)
wait(lambda: pool.num_alive == 2)
with metadata(gcp(True)) as url:
    watcher = ["-m", "cacp_ray.cli", "watch-spot", "--cloud", "gcp", "--metadata", url]
    watcher += ["--address", cluster.address, "--node", taken.node_id]
    done = subprocess.run([sys.executable, *watcher], capture_output=True, text=True)
wait(lambda: taken.node_id in read_nodes().draining or taken.node_id not in read_nodes().cpus, 30)
outcome = {"code": done.returncode, "error": done.stderr, "kept": kept.node_id in read_nodes().cpus,
           "out": taken.node_id in read_nodes().draining or taken.node_id not in read_nodes().cpus}
"""


def draw():
    """Draws a search split of resized images by class."""
    from cacp_ray.config.reading import load_config
    from cacp_ray.config.run import DataConfig
    from cacp_ray.workflows.splits import Splits

    values = {"train": {"path": SPLIT["path"]}, "search": SPLIT, "resize": 40, "crop": 32}
    return Splits(load_config(DataConfig, values)).read("search")


def make_seen(split):
    """Scores 1 if the images sent are bit for bit those that this node draws itself."""

    own = draw()
    is_same = (own.images == split.images).all() and (own.labels == split.labels).all()

    def score(candidate):
        time.sleep(0.05)
        return measurement_of(candidate.index, float(is_same), 1.0, 1.0, len(split), 0.05)

    return score


def make_slow(seconds):
    """Takes that many seconds to score."""

    def score(candidate):
        time.sleep(seconds)
        return measurement_of(candidate.index, 0.5, 0.5, 1.0, 1, seconds)

    return score


def run(script):
    done = subprocess.run(
        [sys.executable, "-c", START + script + END],
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_a_pool_left_alone_asks_for_little_and_is_there_when_a_node_joins():
    outcome = run(ALONE)
    assert 4 <= outcome["withdrawn"] < 25
    assert outcome["left"] == [1, 1]  # the one taken back left no actor behind
    assert outcome["back"] < 30  # although its next try was due much later
    assert outcome["most"] == 3


def test_every_node_has_the_same_search_split_to_the_bit():
    outcome = run(SPLITS)
    # Fine-tuning needs the folder on every node.
    assert re.search(r"node \S+ cannot train: .*nowhere is not there", outcome.pop("fault"))
    assert outcome == {"nodes": 2, "seen": 12 * [1.0]}


def test_a_candidate_that_is_lost_with_its_nodes_is_not_blamed():
    outcome = run(LOST)
    assert outcome == {"status": "ok", "attempt": 4}


def test_a_machine_whose_cloud_takes_it_away_is_drained_by_its_watcher():
    outcome = run(WATCHED)
    assert outcome["code"] == 0, outcome["error"]
    assert outcome["out"]
    assert outcome["kept"]
