"""A search under faults, on one machine: python bench/soak.py.

A cluster of real processes: a head without CPUs, nodes of one CPU, and a driver whose evaluators of
half a CPU sleep and score by a formula. In the first part nodes come, are drained, are all lost and
come back. In the second part an evaluator, a node or the driver, drawn at random, gets a SIGKILL
every few seconds; nodes come back and the driver resumes. At the end every candidate asked must
have been measured once, and no more than what was in flight at a kill may have been scored twice.
Prints what happened as JSON; exit code 1 when a promise is broken.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import ray

from cacp_ray.distributed import cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import PLACES, RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.table import make_strategy
from tests.machines import PATIENCE_SECONDS, Machines, kill, running
from tests.toy import toy_cost_model, toy_score

RATES = (0.4, 0.6)
NUM_GROUPS = 8
NUM_NODES = 4
EVALUATORS = 2 * NUM_NODES
AWAY_SECONDS = 5.0


def make_formula(folder: str, seconds: float) -> ScoreFunction:
    """A score for actors that logs each call with its process and node; needs no torch."""
    score_of = toy_score(toy_cost_model(NUM_GROUPS))
    node = ray.get_runtime_context().get_node_id()

    def score(candidate: Candidate) -> Measurement:
        line = f"{time.time()} {os.getpid()} {node} {candidate.index}\n"
        with (Path(folder) / "scored.log").open("a") as log:
            log.write(line)
        time.sleep(seconds)
        score = score_of(candidate.keep_counts)
        return Measurement(index=candidate.index, score=score, images=100, seconds=seconds)

    return score


def drive(folder: Path, address: str, episodes: int, seconds: float) -> None:
    """Runs the search, or resumes what its folder holds."""
    cluster.connect(address)
    cost_model = toy_cost_model(NUM_GROUPS)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    problem = Problem(cost_model, budget, RATES, 0, episodes, uniform_prior(NUM_GROUPS))
    pool = RayEvaluatorPool(
        RayActors(make_formula, {"folder": str(folder), "seconds": seconds}),
        num_evaluators=EVALUATORS,
        cpus_per_evaluator=0.5,
    )
    loop = SearchLoop(
        pool,
        cost_model,
        RunDirectory(folder / "run"),
        rates=RATES,
        evaluations=episodes,
        mode="async",
        checkpoint_seconds=2.0,
    )
    loop.run(make_strategy("random", problem))
    pool.close()


class Score(NamedTuple):
    """A line of the log: a score that was begun."""

    moment: float
    process: int
    node: str
    candidate: int


class Watched:
    """What the driver and its evaluators have written so far."""

    def __init__(self, machines: Machines) -> None:
        self.folder = machines.folder
        self._machines = machines

    def scores(self, since: float = 0.0) -> list[Score]:
        """Every score begun at or after a moment."""
        file = self.folder / "scored.log"
        lines = file.read_text().splitlines() if file.exists() else []
        fields = [line.split() for line in lines]
        scores = [Score(float(t), int(p), node, int(i)) for t, p, node, i in fields]
        return [score for score in scores if score.moment >= since]

    def rows(self) -> list[EpisodeRecord]:
        """What the run directory holds."""
        return RunDirectory(self.folder / "run").read_records()

    def seconds_until_busy(self, start: float, evaluators: int) -> float:
        """Seconds from `start` until so many processes have begun a score."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            seen: set[int] = set()
            for score in self.scores(start):
                seen.add(score.process)
                if len(seen) >= evaluators:
                    return score.moment - start
            time.sleep(0.2)
            self._machines.restart_failed()
        raise TimeoutError(f"{evaluators} evaluators are not busy after {PATIENCE_SECONDS:.0f} s")


def scale(machines: Machines, watched: Watched) -> dict[str, float]:
    """One node, four, two of them drained, none, four again; seconds of each change."""
    seconds = {"first_score": watched.seconds_until_busy(time.time(), 1)}
    start = time.time()
    machines.add_nodes(NUM_NODES - 1)
    seconds["three_nodes_more_are_used"] = watched.seconds_until_busy(start, EVALUATORS)
    drained = sorted({score.node for score in watched.scores(time.time() - 3)})[:2]
    for node in drained:
        machines.drain(node)
    time.sleep(6.0)
    late = [score for score in watched.scores(time.time() - 3) if score.node in drained]
    seconds["scores_on_drained_nodes"] = len(late)
    while machines.nodes:
        machines.lose_node(0)
    time.sleep(AWAY_SECONDS)
    machines.add_nodes(NUM_NODES)
    start = time.time()
    seconds["all_lost_then_80_percent_back"] = watched.seconds_until_busy(
        start, round(0.8 * EVALUATORS)
    )
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=int, default=2000)
    parser.add_argument("--score-seconds", type=float, default=1.0)
    parser.add_argument("--kill-seconds", type=float, default=15.0, help="between two kills")
    parser.add_argument("--driver-kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--drive", nargs=2, metavar=("FOLDER", "ADDRESS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        folder, address = options.drive
        drive(Path(folder), address, options.episodes, options.score_seconds)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds, which ends the cluster
    with running() as machines:
        try:
            outcome = soak(machines, options)
        except TimeoutError as error:
            outcome = {"broken": [str(error)], "log": log_end(machines)}
    print(json.dumps(outcome, indent=2))
    sys.exit(bool(outcome["broken"]))


def soak(machines: Machines, options: argparse.Namespace) -> dict[str, Any]:
    """Runs both parts; `broken` names the promises that were not kept."""
    watched = Watched(machines)
    command = [sys.executable, str(Path(__file__)), "--drive", str(machines.folder)]
    command += [machines.address, "--episodes", str(options.episodes)]
    command += ["--score-seconds", str(options.score_seconds)]
    started = time.time()
    machines.add_nodes(1)
    driver = machines.spawn(command)
    kills = {"evaluator": 0, "node": 0, "driver": 0}
    try:
        seconds = scale(machines, watched)
        chance = random.Random(options.seed)
        away: list[float] = []  # when each lost node comes back
        kill_at = time.time() + options.kill_seconds
        while driver.poll() is None or driver.returncode != 0:
            time.sleep(0.2)
            now = time.time()
            if away and away[0] <= now:
                away.pop(0)
                machines.add_nodes(1)
            if driver.poll() is not None and driver.returncode != 0:
                return {"broken": [f"the driver failed: {log_end(machines)}"], "kills": kills}
            if now < kill_at:
                continue
            kill_at = now + options.kill_seconds
            kinds = ["evaluator", "node", "driver"]
            kind = chance.choice(kinds if kills["driver"] < options.driver_kills else kinds[:2])
            recent = {score.process for score in watched.scores(now - 5)}
            recent = {process for process in recent if is_evaluator(process)}
            if kind == "evaluator" and recent:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(sorted(recent)), signal.SIGKILL)
            elif kind == "node" and machines.nodes:
                machines.lose_node(chance.randrange(len(machines.nodes)))
                away.append(now + AWAY_SECONDS)
            elif kind == "driver" and driver.poll() is None:
                kill(driver)
                driver = machines.spawn(command)
            else:
                continue
            kills[kind] += 1
    finally:
        kill(driver)
    return judge(watched, options, kills, seconds, time.time() - started)


def judge(
    watched: Watched,
    options: argparse.Namespace,
    kills: dict[str, int],
    seconds: dict[str, float],
    total: float,
) -> dict[str, Any]:
    """The outcome, and which promises it breaks."""
    rows = [row for row in watched.rows() if not row.cached]
    distinct = {row.key for row in rows}
    num_scores = len(watched.scores())
    # The first part drains two nodes in time and loses four, two of them with work.
    most = PLACES * (kills["evaluator"] + 2 * kills["node"] + 2 * NUM_NODES)
    most += PLACES * EVALUATORS * kills["driver"]
    promises = {
        "every candidate asked was measured": len(distinct) == options.episodes,
        "none was counted twice": len(rows) == len(distinct) == len({row.index for row in rows}),
        "none failed": all(row.status == "ok" for row in rows),
        "at most what was in flight was scored twice": num_scores - len(rows) <= most,
        "drained nodes got nothing new": seconds["scores_on_drained_nodes"] == 0,
        "80 % were back within 30 s": seconds["all_lost_then_80_percent_back"] <= 30,
    }
    return {
        "measurements": len(rows),
        "distinct": len(distinct),
        "failed": sum(row.status != "ok" for row in rows),
        "scores_begun": num_scores,
        "kills": kills,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "minutes": round(total / 60, 1),
        "broken": [name for name, is_kept in promises.items() if not is_kept],
    }


def is_evaluator(process: int) -> bool:
    """Whether the process is an actor still: its number may have been given to another."""
    try:
        return "RayEvaluator" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def log_end(machines: Machines) -> str:
    return (machines.folder / "ray.log").read_text()[-2000:]


if __name__ == "__main__":
    main()
