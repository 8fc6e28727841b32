"""Strategies that go by steps, on the real pool: kills in the middle of a step change nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest

from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.table import make_strategy
from tests.small import measurement_of
from tests.toy import toy_cost_model, toy_score

pytestmark = [pytest.mark.ray, pytest.mark.slow]

RATES = (0.3, 0.5, 0.7)
EVALUATIONS = 120
# A step of pcp has 9 candidates or 3, one of cap has one for each of three rates.
STRATEGIES = ("pcp", "cap")

# A search in a process, and a Ray, of its own.
DRIVER = """
import sys
from pathlib import Path
from cacp_ray.distributed import cluster
from tests.ray.test_steps import search
cluster.connect("local", num_cpus=2)
search(sys.argv[1], Path(sys.argv[2]), 2)
"""


def make_formula(seconds):
    find_score = toy_score(toy_cost_model())

    def measure(candidate):
        time.sleep(seconds)
        score = find_score(candidate.keep_counts)
        return measurement_of(candidate.index, score, 0.0, 1 - score, 100, seconds)

    return measure


def search(strategy, folder, num_evaluators, on_progress=None):
    """Continues the search of a folder on the toy network, to its end."""
    cost_model = toy_cost_model()
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    problem = Problem(cost_model, budget, RATES, 0, EVALUATIONS, uniform_prior(8))
    pool = RayEvaluatorPool(
        RayActors(make_formula, {"seconds": 0.05}),
        num_evaluators=num_evaluators,
        cpus_per_evaluator=0.5,
    )
    loop = SearchLoop(
        pool,
        cost_model,
        RunDirectory(folder),
        rates=RATES,
        evaluations=EVALUATIONS,
        mode="async",
        checkpoint_ticks=7,
        on_progress=on_progress,
    )
    try:
        loop.run(make_strategy(strategy, problem))
    finally:
        pool.close()


def read(folder):
    return RunDirectory(folder).read_records()


def measured(folder):
    """The distinct scores of candidates; async mode may record one twice after a kill."""
    return {(row.keep_counts, row.rate, row.score, row.loss, row.status) for row in read(folder)}


@pytest.fixture(scope="module", params=STRATEGIES)
def serial(request, ray_cluster, tmp_path_factory):
    """A strategy, and its search by one evaluator, without a kill."""
    folder = tmp_path_factory.mktemp(request.param)
    search(request.param, folder, 1)
    assert len(measured(folder)) > 60
    return request.param, folder


def evaluator_processes():
    """Ids of the evaluators' processes."""
    from ray._private.state import actors

    alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
    return [actor["Pid"] for actor in alive if actor["ActorClassName"] == "RayEvaluator"]


def test_two_evaluators_one_killed_within_a_step_find_what_one_does(serial, tmp_path):
    strategy, expected = serial
    killed = []

    def kill_one(progress):
        if progress.evaluations >= 40 and progress.num_alive == 2 and not killed:
            killed.append(evaluator_processes()[0])
            os.kill(killed[0], signal.SIGKILL)

    search(strategy, tmp_path, 2, kill_one)
    assert killed
    # Its candidate was measured again.
    assert 2 in {row.attempt for row in read(tmp_path)}
    assert measured(tmp_path) == measured(expected)


def test_a_driver_killed_within_a_step_resumes_to_the_same(serial, tmp_path):
    strategy, expected = serial
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, strategy, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 50
        while process.poll() is None and time.monotonic() < deadline:
            if len(read(tmp_path)) >= 40:
                break
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    before = measured(tmp_path)
    assert 40 <= len(before) < len(measured(expected))
    assert before <= measured(expected)
    search(strategy, tmp_path, 2)
    assert measured(tmp_path) == measured(expected)
