"""How many evaluators one driver keeps busy: python bench/scale.py.

Evaluators sleep (`--seconds`, give or take half, seeded) instead of computing; the driver is the
real one: the loop, the conditional agent with learning, a run directory. First real actor processes
on a local Ray, then the same driver in simulated time: its own processor time passes on the clock
as it is spent, waiting is skipped, and each candidate adds what Ray cost in the real runs
(`--ray-ms`). With learning `elsewhere` the gradient steps pass on a clock of their own: what a
learner in a second process would give, were its weights here at once. Idle is the share of the
evaluators' time, from the moment all are up to the last question, in which they had nothing to do.
"""

import argparse
import dataclasses
import heapq
import logging
import pickle
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from report import positive, print_environment, print_table

from cacp_ray.agent.cacp.algorithm import CACPConfig
from cacp_ray.config import PruningConfig
from cacp_ray.distributed import cluster
from cacp_ray.distributed.pool import PLACES, RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.evaluation.racing import encode_hits
from cacp_ray.loading import make_budget
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.plan import Plan, make_plan
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.settings import AgentSettings

RATES = (0.3, 0.5, 0.7)
SPREAD = (0.5, 1.5)
SPLITS = (1_500, 5_000, 10_000, 50_000)  # images

Learning = Literal["on", "off", "elsewhere"]


def pretend(candidate: Candidate, mean_seconds: float) -> Measurement:
    """A measurement by formula, with the seconds it would have taken."""
    spread = float(np.random.default_rng(candidate.index).uniform(*SPREAD))
    seconds = mean_seconds * spread
    kept = np.log(np.array(candidate.keep_counts, float))
    top1 = float(1 / (1 + np.exp(2 - kept.mean())))
    return Measurement(candidate.index, top1, 1.0, 1 - top1, images=5000, seconds=seconds)


def measure_bytes(candidate: Candidate, num_images: int) -> tuple[int, int]:
    """Of a candidate and its measurement, with which images were right; and where it races."""
    hits = encode_hits(np.random.default_rng(0).random(num_images) < 0.8)
    found = len(pickle.dumps(dataclasses.replace(pretend(candidate, 1.0), hits=hits)))
    racing = dataclasses.replace(candidate, best=hits)
    return len(pickle.dumps(candidate)) + found, len(pickle.dumps(racing)) + found


def make_sleeping(mean_seconds: float) -> ScoreFunction:
    """For actors: no torch is imported there, or 64 of them would not fit."""

    def score(candidate: Candidate) -> Measurement:
        measurement = pretend(candidate, mean_seconds)
        time.sleep(measurement.seconds)
        return measurement

    return score


class SimulatedPool:
    """Evaluators in simulated time, with as many places each as Ray's pool gives them."""

    def __init__(self, num_evaluators: int, mean_seconds: float, ray_seconds: float) -> None:
        self.capacity = PLACES * num_evaluators
        self.num_alive = num_evaluators
        self._free = [0.0] * num_evaluators  # when each has done all it was given
        self._out: list[tuple[float, int, Measurement]] = []
        self._mean_seconds = mean_seconds
        self._ray_seconds = ray_seconds
        self._learner_free = 0.0
        self._skipped = 0.0  # less what was spent in the place of another process
        self._cpu = time.thread_time()

    def now(self) -> float:
        """Processor time spent so far, and the waiting that was skipped."""
        return self._skipped + time.thread_time() - self._cpu

    def elsewhere(self, learn: Callable[[int], int]) -> Callable[[int], int]:
        """The same in another process: nothing while that is busy, and no time on this clock."""

        def run(max_updates: int) -> int:
            if self.now() < self._learner_free:
                return 0
            started = time.thread_time()
            updates = learn(max_updates)
            spent = time.thread_time() - started
            self._skipped -= spent
            self._learner_free = self.now() + spent
            return updates

        return run

    def submit(self, candidate: Candidate) -> None:
        """To the evaluator that is free first."""
        self._skipped += self._ray_seconds
        measurement = pretend(candidate, self._mean_seconds)
        done = max(self.now(), heapq.heappop(self._free)) + measurement.seconds
        heapq.heappush(self._free, done)
        measurement = dataclasses.replace(measurement, finished_at=done)
        heapq.heappush(self._out, (done, candidate.index, measurement))

    def results(self, timeout: float) -> list[Measurement]:
        """What is done by now; skips the wait for the first."""
        if self._out:
            self._skipped += min(timeout, max(0.0, self._out[0][0] - self.now()))
        found = []
        while self._out and self._out[0][0] <= self.now():
            found.append(heapq.heappop(self._out)[2])
        return found

    def close(self) -> None:
        """Nothing to end."""


class Watch:
    """Processor seconds of the driver's thread, by what it was doing."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, its time added to `name`."""

        def run(*args: Any) -> Any:
            started = time.thread_time()
            try:
                return call(*args)
            finally:
                spent = time.thread_time() - started
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return run


def run(
    plan: Plan, pool: RayEvaluatorPool | SimulatedPool, evaluations: int, learning: Learning
) -> dict[str, float]:
    """A search; shares of idle time, milliseconds an episode."""
    settings = AgentSettings(updates_per_episode=0) if learning == "off" else AgentSettings()
    channels = plan.cost_model.num_channels
    agent = CACPConfig().agent(settings, num_actions=len(channels)).build_algo()
    budget = make_budget(plan, "macs", PruningConfig())
    prior = uniform_prior(len(channels))
    mdp = AllocationMDP(plan.cost_model, budget, prior, settings.action_scale)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        loop = SearchLoop(
            pool, plan.cost_model, directory, rates=RATES, evaluations=evaluations, mode="async"
        )
        agent.attach(mdp, RATES, 0, evaluations, watch.timed("tick", loop.tick))
        agent.ask = watch.timed("ask", agent.ask)
        agent.learn = watch.timed("learn", agent.learn)
        if learning == "elsewhere":
            assert isinstance(pool, SimulatedPool)
            agent.learn = pool.elsewhere(agent.learn)
        loop.restore(agent)
        clock = pool.now if isinstance(pool, SimulatedPool) else time.time
        start = end = clock()
        done = 0
        while not loop.done:
            agent.train()
            if loop.progress.evaluations <= evaluations - pool.capacity:
                end, done = clock(), loop.progress.evaluations
        agent.stop()
        rows = directory.read_records()
    finished = np.array([row.finished_at for row in rows])
    begun = finished - [row.seconds for row in rows]
    busy = np.maximum(0, np.minimum(finished, end) - np.maximum(begun, start)).sum()
    return {
        "idle": 1 - busy / (pool.num_alive * (end - start)),
        "per_second": done / (end - start),
        "propose": 1000 * watch.seconds["ask"] / evaluations,
        "dispatch": 1000 * (watch.seconds["tick"] - watch.seconds["ask"]) / evaluations,
        "learn": 1000 * watch.seconds["learn"] / evaluations,
    }


def as_row(kind: str, number: int, learning: Learning, found: dict[str, float]) -> list[str]:
    """Cells of one search."""
    return [
        kind,
        f"{number:,}",
        learning,
        f"{100 * found['idle']:.1f} %",
        f"{found['per_second']:.1f}",
        *(f"{found[name]:.2f}" for name in ("propose", "dispatch", "learn")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--actors", nargs="*", type=positive, default=[1, 4, 16, 64])
    parser.add_argument("--simulated", nargs="*", type=positive, default=[64, 256, 1024, 4096])
    parser.add_argument("--each", type=positive, default=30, help="candidates an evaluator")
    parser.add_argument("--seconds", type=float, default=1.0, help="of an evaluation, mean")
    parser.add_argument("--ray-ms", type=float, default=1.0, help="of Ray, a candidate, simulated")
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    plan = make_plan(build_model(options.model, 10).eval(), torch.zeros(1, 3, 32, 32))
    counts = tuple(plan.cost_model.num_channels.tolist())
    candidate = Candidate(10**6, 0.5, counts)
    sizes = [measure_bytes(candidate, num_images) for num_images in SPLITS]
    rows = []
    if options.actors:
        cluster.connect("local", num_cpus=2)
        for number in options.actors:
            pool = RayEvaluatorPool(
                make_sleeping,
                {"mean_seconds": options.seconds},
                num_evaluators=number,
                cpus_per_evaluator=1 / 64,
            )
            while pool.num_alive < number:
                pool.results(0.0)
                time.sleep(0.1)
            found = run(plan, pool, options.each * number, "on")
            pool.close()
            rows.append(as_row("actors", number, "on", found))
            print(rows[-1], flush=True)
        cluster.disconnect()
    for number in options.simulated:
        for learning in get_args(Learning):
            pool = SimulatedPool(number, options.seconds, options.ray_ms / 1000)
            found = run(plan, pool, options.each * number, learning)
            rows.append(as_row("simulated", number, learning, found))
            print(rows[-1], flush=True)
    header = [
        "evaluators", "number", "learning", "idle", "candidates/s",
        "ms proposing", "ms dispatching", "ms learning",
    ]  # fmt: skip
    print_table(f"{options.model}, evaluations of {options.seconds:g} s", header, rows)
    told = ", ".join(
        f"{n:,} images: {a:,} ({b:,})" for n, (a, b) in zip(SPLITS, sizes, strict=True)
    )
    print(f"\nBytes of a candidate and its measurement, pickled (of one that races): {told}.")
    print_environment(0)


if __name__ == "__main__":
    main()
