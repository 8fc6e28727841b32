"""How many evaluators one driver keeps busy: python bench/scale.py.

Evaluators sleep (`--seconds`, give or take half, seeded) instead of computing. The driver is real:
the loop, the conditional agent with learning, a run directory. It first serves actor processes on a
local Ray, then evaluators in simulated time: the driver's processor time passes on the clock as it
is spent, waiting is skipped, and each candidate adds what Ray cost in the real runs (`--ray-ms`).
With learning `elsewhere`, gradient steps pass on a clock of their own: the gain of a learner in a
second process whose weights would arrive here at once. Idle is the share of the evaluators' time,
from the moment all are up to the last question, in which they had nothing to do.
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

from cacp_ray.agent.cacp.agent import CACP
from cacp_ray.config.run import PruningConfig
from cacp_ray.distributed import cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import PLACES, RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.evaluation.racing import encode_hits
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import AllocationSpace, uniform_prior
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.settings import AgentSettings
from cacp_ray.workflows.setup import make_budget

RATES = (0.3, 0.5, 0.7)
SPREAD = (0.5, 1.5)
SPLITS = (1_500, 5_000, 10_000, 50_000)  # images

Learning = Literal["on", "off", "elsewhere"]


def pretend(candidate: Candidate, mean_seconds: float) -> Measurement:
    """A measurement by formula, with the seconds it would have taken."""
    spread = float(np.random.default_rng(candidate.index).uniform(*SPREAD))
    seconds = mean_seconds * spread
    kept = np.log(np.array(candidate.keep_counts, float))
    score = float(1 / (1 + np.exp(2 - kept.mean())))
    return Measurement(index=candidate.index, score=score, images=5000, seconds=seconds)


def measure_bytes(candidate: Candidate, num_images: int) -> tuple[int, int]:
    """Bytes of a candidate and its measurement, without and with an opponent to race."""
    hits = encode_hits(np.random.default_rng(0).random(num_images) < 0.8)
    answer = len(pickle.dumps(dataclasses.replace(pretend(candidate, 1.0), hits=hits)))
    racing = dataclasses.replace(candidate, opponent=hits)
    return len(pickle.dumps(candidate)) + answer, len(pickle.dumps(racing)) + answer


def make_sleeping(mean_seconds: float) -> ScoreFunction:
    """A score for actors that sleep. It imports no torch: 64 actors would not fit with it."""

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
        self._free = [0.0] * num_evaluators  # moment at which each evaluator is free
        self._out: list[tuple[float, int, Measurement]] = []
        self._mean_seconds = mean_seconds
        self._ray_seconds = ray_seconds
        self._learner_free = 0.0
        self._skipped = 0.0  # waiting skipped, less time spent in place of another process
        self._cpu = time.thread_time()

    def now(self) -> float:
        """Processor time spent so far plus the waiting that was skipped."""
        return self._skipped + time.thread_time() - self._cpu

    def elsewhere(self, update: Callable[[int], float]) -> Callable[[int], float]:
        """The same as in another process: it takes no time here, and no steps while it is busy."""

        def run(steps: int) -> float:
            if self.now() < self._learner_free:
                return 0.0
            started = time.thread_time()
            error = update(steps)
            spent = time.thread_time() - started
            self._skipped -= spent
            self._learner_free = self.now() + spent
            return error

        return run

    def submit(self, candidate: Candidate) -> None:
        """Gives the candidate to the evaluator that is free first."""
        self._skipped += self._ray_seconds
        measurement = pretend(candidate, self._mean_seconds)
        done = max(self.now(), heapq.heappop(self._free)) + measurement.seconds
        heapq.heappush(self._free, done)
        measurement = dataclasses.replace(measurement, finished_at=done)
        heapq.heappush(self._out, (done, candidate.index, measurement))

    def results(self, timeout: float) -> list[Measurement]:
        """Measurements done by now; skips the wait for the first one."""
        if self._out:
            self._skipped += min(timeout, max(0.0, self._out[0][0] - self.now()))
        done = []
        while self._out and self._out[0][0] <= self.now():
            done.append(heapq.heappop(self._out)[2])
        return done

    def close(self) -> None:
        """Nothing to end."""


class Watch:
    """Processor seconds of the driver's thread, by kind of work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function; its time is added to `name`."""

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
    """Runs a search; returns the idle share, candidates a second and milliseconds an episode."""
    settings = AgentSettings(updates_per_episode=0) if learning == "off" else AgentSettings()
    channels = plan.cost_model.num_channels
    budget = make_budget(plan, "macs", PruningConfig())
    space = AllocationSpace(budget, uniform_prior(len(channels)), settings.action_scale)
    agent = CACP(settings, space, RATES, 0)
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        directory = RunDirectory(Path(folder))
        loop = SearchLoop(
            pool, plan.cost_model, directory, rates=RATES, evaluations=evaluations, mode="async"
        )
        agent.ask = watch.timed("ask", agent.ask)
        agent.update = watch.timed("update", agent.update)
        if learning == "elsewhere":
            assert isinstance(pool, SimulatedPool)
            agent.update = pool.elsewhere(agent.update)
        tick = watch.timed("tick", loop.tick)
        loop.restore(agent)
        clock = pool.now if isinstance(pool, SimulatedPool) else time.time
        start = end = clock()
        done = 0
        while not loop.done:
            tick(agent)
            if loop.progress.evaluations <= evaluations - pool.capacity:
                end, done = clock(), loop.progress.evaluations
        rows = directory.read_records()
    finished = np.array([row.finished_at for row in rows])
    begun = finished - [row.seconds for row in rows]
    busy = np.maximum(0, np.minimum(finished, end) - np.maximum(begun, start)).sum()
    ask, update = watch.seconds["ask"], watch.seconds["update"]
    return {
        "idle": 1 - busy / (pool.num_alive * (end - start)),
        "per_second": done / (end - start),
        "propose": 1000 * ask / evaluations,
        "dispatch": 1000 * (watch.seconds["tick"] - ask - update) / evaluations,
        "learn": 1000 * update / evaluations,
    }


def as_row(kind: str, number: int, learning: Learning, figures: dict[str, float]) -> list[str]:
    """Cells of one search."""
    return [
        kind,
        f"{number:,}",
        learning,
        f"{100 * figures['idle']:.1f} %",
        f"{figures['per_second']:.1f}",
        *(f"{figures[name]:.2f}" for name in ("propose", "dispatch", "learn")),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet56")
    parser.add_argument("--actors", nargs="*", type=positive, default=[1, 4, 16, 64])
    parser.add_argument("--simulated", nargs="*", type=positive, default=[64, 256, 1024, 4096])
    parser.add_argument("--each", type=positive, default=30, help="candidates for each evaluator")
    parser.add_argument("--seconds", type=float, default=1.0, help="mean of an evaluation")
    parser.add_argument(
        "--ray-ms", type=float, default=1.0, help="of Ray for a simulated candidate"
    )
    options = parser.parse_args()
    logging.getLogger("ray").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    plan = make_plan(build_model(options.model, 10).eval(), torch.zeros(1, 3, 32, 32))
    counts = tuple(plan.cost_model.num_channels.tolist())
    candidate = Candidate(0.5, counts, index=10**6)
    sizes = [measure_bytes(candidate, num_images) for num_images in SPLITS]
    rows = []
    if options.actors:
        cluster.connect("local", num_cpus=2)
        for number in options.actors:
            pool = RayEvaluatorPool(
                RayActors(make_sleeping, {"mean_seconds": options.seconds}),
                num_evaluators=number,
                cpus_per_evaluator=1 / 64,
            )
            while pool.num_alive < number:
                pool.results(0.0)
                time.sleep(0.1)
            figures = run(plan, pool, options.each * number, "on")
            pool.close()
            rows.append(as_row("actors", number, "on", figures))
            print(rows[-1], flush=True)
        cluster.disconnect()
    for number in options.simulated:
        for learning in get_args(Learning):
            pool = SimulatedPool(number, options.seconds, options.ray_ms / 1000)
            figures = run(plan, pool, options.each * number, learning)
            rows.append(as_row("simulated", number, learning, figures))
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
