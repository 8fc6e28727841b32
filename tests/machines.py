"""A Ray cluster of real `ray start` processes on this machine, for tests and bench/soak.py."""

import os
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

from cacp_ray.distributed import cluster

RAY = [str(Path(sys.executable).parent / "ray")]
PATIENCE_SECONDS = 90.0


@contextmanager
def running(*head_options: str, port: int | None = None, **variables: str) -> Iterator["Machines"]:
    """A cluster with a head and no nodes yet, ended and deleted on the way out.

    Args:
        head_options: Options of `ray start --head`; by default, no dashboard.
        port: Port of the head; a free one by default.
        variables: Environment variables of the head.
    """
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


class Machines:
    """The head and the nodes of a cluster, each a process group that can be killed whole."""

    def __init__(self, folder: Path, port: int, *head_options: str, **variables: str) -> None:
        self.folder = folder
        self.address = f"127.0.0.1:{port}"
        # `ray start` notes its address in our folder, so `auto` still means your own cluster here.
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = os.environ | token | {"RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"}
        self.nodes: list[subprocess.Popen[bytes]] = []
        head = [*RAY, "start", "--head", f"--port={port}", "--num-cpus=0", *head_options]
        self.head = self.spawn(head, **variables)
        self._wait_for_head()
        self._wait_for_sockets(1)

    def spawn(self, command: list[str], **variables: str) -> subprocess.Popen[bytes]:
        """Starts a command in a process group of its own."""
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
        """Starts nodes of one CPU, one by one: at once, they would choose the same socket."""
        for _ in range(count):
            before = self._num_sockets()
            self.nodes.append(self._start_node(**variables))
            self._wait_for_sockets(before + 1)

    def restart_failed(self) -> None:
        """Starts nodes again whose start has failed, as a cloud does."""
        for index, node in enumerate(self.nodes):
            if node.poll() is not None:
                self.nodes[index] = self._start_node()

    def _start_node(self, **variables: str) -> subprocess.Popen[bytes]:
        command = [*RAY, "start", f"--address={self.address}", "--num-cpus=1"]
        return self.spawn(command, **variables)

    def lose_node(self, index: int) -> None:
        """Kills a node, as a spot node is taken away unannounced."""
        kill(self.nodes.pop(index))

    def drain(self, node: str) -> None:
        """Announces the end of a node, as a cloud does for a spot node."""
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "soak"]
        command = [*RAY, "drain-node", "--address", self.address, "--node-id", node, *reason]
        subprocess.run(
            [*command, "--deadline-remaining-seconds", "60"],
            check=True,
            capture_output=True,
            env=self.environment,
        )

    def close(self) -> None:
        """Kills the head and all nodes."""
        for process in (*self.nodes, self.head):
            kill(process)

    def _wait_for_head(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < deadline:
            with suppress(Exception):
                cluster._require_answer(self.address)
                return
            time.sleep(0.2)
        raise TimeoutError(f"no head at {self.address}")

    def _wait_for_sockets(self, count: int) -> None:
        """Waits until so many object stores are up, the head's included."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while self._num_sockets() < count and time.monotonic() < deadline:
            time.sleep(0.05)

    def _num_sockets(self) -> int:
        """Sockets of object stores; those of nodes that are gone remain."""
        return len([*(self.folder / "ray").glob("session_2*/sockets/plasma_store*")])


def free_port() -> int:
    """A port of this machine that nothing listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def kill(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and to everything it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
