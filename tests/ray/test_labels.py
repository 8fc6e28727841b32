"""Evaluators and trials run on the nodes whose labels are asked for, and on no others."""

import json
import os
import subprocess
import sys

import pytest
import ray

from tests.small import measurement_of

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# A head without CPUs, and two nodes.
SCRIPT = """
import json, sys
import ray
from ray import tune
from ray.cluster_utils import Cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.nodes import check_labels, read_nodes
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.tuning.experiment import TrialFiles, as_resources, make_run_config, running_tune
from tests.ray.test_labels import make_locating, tell_node

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
for zone in "ab":
    cluster.add_node(num_cpus=2, labels={"zone": zone})
cluster.wait_for_nodes()
zones = {node["NodeID"]: node["Labels"].get("zone", "") for node in ray.nodes()}

def score_in(selector):
    pool = RayEvaluatorPool(
        RayActors(make_locating, {}, {"zone": selector}), num_evaluators=2, cpus_per_evaluator=1
    )
    for index in range(6):
        pool.submit(Candidate(0.5, (1,), index=index))
    found = []
    while len(found) < 6:
        found += pool.results(10.0)
    pool.close()
    return sorted({zones[one.error] for one in found})

outcome = {selector: score_in(selector) for selector in ("b", "in(a, c)")}
outcome["seen"] = [sorted(zones[n] for n in read_nodes({"zone": s}).cpus) for s in ("a", "!a")]
files = TrialFiles(sys.argv[1])
with running_tune(lambda *_: None, files):
    results = tune.Tuner(
        tune.with_resources(tell_node, as_resources(1, 0.0, {"zone": "b"})),
        param_space={"x": tune.grid_search([1, 2, 3])},
        run_config=make_run_config(files, [], 1),
    ).fit()
outcome["trials"] = sorted({zones[result.metrics["node"]] for result in results})
check_labels({"zone": "c"}, cluster.address, "cluster.label_selector")
try:
    check_labels({"zone": "c"}, "local", "cluster.label_selector")
except ConfigError as error:
    outcome["refused"] = str(error)
ray.shutdown()
cluster.shutdown()
print(json.dumps(outcome))
"""


def make_locating():
    """Reports in `error` on which node it scores."""
    import torch  # noqa: F401 - what an evaluator of networks imports

    node = ray.get_runtime_context().get_node_id()

    def score(candidate):
        return measurement_of(candidate.index, 0.5, 0.5, 0.5, 10, 0.0, error=node)

    return score


def tell_node(config):
    """A trial."""
    ray.tune.report({"node": ray.get_runtime_context().get_node_id()})


def test_evaluators_and_trials_run_where_the_labels_are(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path / "tune")],
        check=False,
        capture_output=True,
        text=True,
        timeout=400,
        env=os.environ | {"PYTHONPATH": os.getcwd(), "HOME": str(tmp_path)},
    )
    assert result.returncode == 0, result.stderr
    outcome = json.loads(result.stdout.splitlines()[-1])
    assert outcome.pop("refused").endswith(
        "asks for (zone=c): leave it out, or join a cluster by --address"
    )
    assert outcome == {"b": ["b"], "in(a, c)": ["a"], "seen": [["a"], ["", "b"]], "trials": ["b"]}
    assert "no node has the labels" in result.stderr  # of a cluster, which may grow
