"""A search under faults, on one machine: python bench/soak.py.

Real processes: a head without CPUs and nodes of one CPU (`ray start`), a driver that searches
with evaluators of half a CPU which score by a formula and sleep. In the first part nodes come, are
drained, are all lost and come back. In the second, every few seconds an evaluator, a node or the
driver is killed with SIGKILL, at random; nodes come back, the driver resumes. At the end every
candidate asked must have been measured once, and nothing more than what was in flight at a kill
may have been scored twice. Prints what happened as JSON; exit code 1 where a promise is broken.
"""

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import ray

from cacp_ray.distributed import cluster
from cacp_ray.distributed.pool import PLACES, RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.records import EpisodeRecord
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.strategies import make_strategy
from cacp_ray.searching.strategies.problem import Problem
from tests.toy import toy_cost_model, toy_score

RATES = (0.4, 0.6)
NUM_GROUPS = 8
NUM_NODES = 4
EVALUATORS = 2 * NUM_NODES
RAY = [str(Path(sys.executable).parent / "ray")]
AWAY_SECONDS = 5.0
PATIENCE_SECONDS = 90.0


def make_formula(folder: str, seconds: float) -> ScoreFunction:
    """For actors: notes every score that is begun, with its process and node; imports no torch."""
    score_of = toy_score(toy_cost_model(NUM_GROUPS))
    node = ray.get_runtime_context().get_node_id()

    def score(candidate: Candidate) -> Measurement:
        line = f"{time.time()} {os.getpid()} {node} {candidate.index}\n"
        with (Path(folder) / "scored.log").open("a") as log:
            log.write(line)
        time.sleep(seconds)
        top1 = score_of(candidate.keep_counts)
        return Measurement(candidate.index, top1, 1.0, 1 - top1, images=100, seconds=seconds)

    return score


def drive(folder: Path, address: str, episodes: int, seconds: float) -> None:
    """The search, from where its folder stands."""
    cluster.connect(address)
    cost_model = toy_cost_model(NUM_GROUPS)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    problem = Problem(cost_model, budget, RATES, 0, episodes, uniform_prior(NUM_GROUPS))
    pool = RayEvaluatorPool(
        make_formula,
        {"folder": str(folder), "seconds": seconds},
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


class Machines:
    """Processes of a cluster on this machine, each node a group that can be killed whole."""

    def __init__(self, folder: Path, port: int, *head_options: str, **variables: str) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        # Notes of `ray start` go to our folder: a cluster of yours on this machine stays `auto`.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = os.environ | token | {"RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.nodes: list[subprocess.Popen[bytes]] = []
        head = [*RAY, "start", "--head", f"--port={port}", "--num-cpus=0", *head_options]
        self.head = self.spawn(head, **variables)
        cluster_answers(self.address)
        self.wait_for_sockets(1)

    def spawn(self, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        """A process group of its own."""
        options = ["--block", "--min-worker-port=0", "--max-worker-port=0"]
        options += ["--object-store-memory=100000000", "--disable-usage-stats"]
        with (self.folder / "ray.log").open("a") as log:
            return subprocess.Popen(
                [*command, *(options if command[0] == RAY[0] else [])],
                env=self.environment | variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def add_nodes(self, count: int, **variables: str) -> None:
        """Of one CPU each; one after another, as they would choose the same socket at once."""
        for _ in range(count):
            before = self.num_sockets()
            command = [*RAY, "start", f"--address={self.address}", "--num-cpus=1"]
            self.nodes.append(self.spawn(command, **variables))
            self.wait_for_sockets(before + 1)

    def wait_for_sockets(self, count: int) -> None:
        """Until so many object stores are up, the head's included."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self.num_sockets() < count and time.monotonic() < deadline:
            time.sleep(0.05)

    def num_sockets(self) -> int:
        """Of object stores, of nodes that are gone too."""
        return len([*(self.folder / "ray").glob("session_2*/sockets/plasma_store*")])

    def lose_node(self, index: int) -> None:
        """As a spot node that is taken away unannounced."""
        kill(self.nodes.pop(index))

    def drain(self, node: str) -> None:
        """As a spot node whose end is announced."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "soak"]
        command = [*RAY, "drain-node", "--address", self.address, "--node-id", node, *reason]
        subprocess.run(
            [*command, "--deadline-remaining-seconds", "60"],
            check=True,
            capture_output=True,
            env=self.environment,
        )

    def close(self) -> None:
        """Ends all of them."""
        for process in (*self.nodes, self.head):
            kill(process)


def free_port() -> int:
    """Of this machine, now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all that it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def cluster_answers(address: str) -> None:
    """Waits until the head does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        with suppress(Exception):
            cluster._require_answer(address)
            return
        time.sleep(0.2)
    raise TimeoutError(f"no head at {address}")


class Watched:
    """What the driver and its evaluators have written so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def scored(self) -> list[tuple[float, int, str, int]]:
        """Time, process, node and candidate of every score begun."""
        file = self.folder / "scored.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return [(float(t), int(p), n, int(i)) for t, p, n, i in (line.split() for line in lines)]

    def since(self, moment: float) -> list[tuple[float, int, str, int]]:
        """Those begun from a moment on."""
        return [each for each in self.scored() if each[0] >= moment]

    def rows(self) -> list[EpisodeRecord]:
        """What the run directory holds."""
        return RunDirectory(self.folder / "run").read_records()

    def seconds_until_busy(self, start: float, evaluators: int) -> float:
        """From `start` until so many processes have scored, afterwards."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            seen: set[int] = set()
            for moment, process, _, _ in self.since(start):
                seen.add(process)
                if len(seen) >= evaluators:
                    return moment - start
            time.sleep(0.2)
        raise TimeoutError(f"{evaluators} evaluators are not busy after {PATIENCE_SECONDS:.0f} s")


def scale(machines: Machines, watched: Watched) -> dict[str, float]:
    """One node, four, two of them drained, none, four again; seconds of each change."""
    found = {"first_score": watched.seconds_until_busy(time.time(), 1)}
    start = time.time()
    machines.add_nodes(NUM_NODES - 1)
    found["three_nodes_more_are_used"] = watched.seconds_until_busy(start, EVALUATORS)
    nodes = sorted({node for _, _, node, _ in watched.since(time.time() - 3)})[:2]
    for node in nodes:
        machines.drain(node)
    time.sleep(6.0)
    late = [each for each in watched.since(time.time() - 3) if each[2] in nodes]
    found["scores_on_drained_nodes"] = len(late)
    while machines.nodes:
        machines.lose_node(0)
    time.sleep(AWAY_SECONDS)
    machines.add_nodes(NUM_NODES)
    start = time.time()
    found["all_lost_then_80_percent_back"] = watched.seconds_until_busy(
        start, round(0.8 * EVALUATORS)
    )
    return found


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the cluster is ended
    with running() as machines:
        try:
            found = soak(machines, options)
        except TimeoutError as error:
            found = {"broken": [str(error)], "log": log_end(machines)}
    print(json.dumps(found, indent=2))
    sys.exit(bool(found["broken"]))


@contextmanager
def running(*head_options: str, port: int | None = None, **variables: str) -> Iterator[Machines]:
    """A head of these options, without a dashboard by default, and the nodes that are added."""
    folder = Path(tempfile.mkdtemp(prefix="soak", dir="/tmp"))  # Ray's sockets need a short path
    machines = None
    try:
        options = head_options or ("--include-dashboard=false",)
        machines = Machines(folder, port or free_port(), *options, **variables)
        yield machines
    finally:
        if machines is not None:
            machines.close()
        shutil.rmtree(folder, ignore_errors=True)


def soak(machines: Machines, options: argparse.Namespace) -> dict[str, Any]:
    """Both parts; `broken` names the promises that were not kept."""
    watched = Watched(machines.folder)
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
            recent = {process for _, process, _, _ in watched.since(now - 5)}
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
    """What came of it."""
    rows = [row for row in watched.rows() if not row.cached]
    distinct = {row.subnet for row in rows}
    scored = watched.scored()
    # Beside the kills of the second part: two nodes drained in time, and four lost, two with work.
    most = PLACES * (kills["evaluator"] + 2 * kills["node"] + 2 * NUM_NODES)
    most += PLACES * EVALUATORS * kills["driver"]
    promises = {
        "every candidate asked was measured": len(distinct) == options.episodes,
        "none was counted twice": len(rows) == len(distinct) == len({row.index for row in rows}),
        "none failed": all(row.status == "ok" for row in rows),
        "at most what was in flight was scored twice": len(scored) - len(rows) <= most,
        "drained nodes got nothing new": seconds["scores_on_drained_nodes"] == 0,
        "80 % were back within 30 s": seconds["all_lost_then_80_percent_back"] <= 30,
    }
    return {
        "measurements": len(rows),
        "distinct": len(distinct),
        "failed": sum(row.status != "ok" for row in rows),
        "scores_begun": len(scored),
        "kills": kills,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "minutes": round(total / 60, 1),
        "broken": [name for name, is_kept in promises.items() if not is_kept],
    }


def is_evaluator(process: int) -> bool:
    """Whether the number is still that of an actor: it may have been given anew."""
    try:
        return "RayEvaluator" in Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return False


def log_end(machines: Machines) -> str:
    return (machines.folder / "ray.log").read_text()[-2000:]


if __name__ == "__main__":
    main()
