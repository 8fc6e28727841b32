import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import ray
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]

from cacp_ray.distributed import cluster
from cacp_ray.errors import ConfigError

pytestmark = pytest.mark.ray


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has the test see no Ray, though other tests of this session may have started one."""
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster, "CONNECT_TIMEOUT_S", 1.0)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def refused(address: str | None) -> str:
    started = time.monotonic()
    with pytest.raises(ConfigError) as caught:
        cluster.connect(address)
    assert time.monotonic() - started < 30
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.usefixtures("unconnected")
def test_a_dead_address_is_one_line_with_the_next_step() -> None:
    address = f"127.0.0.1:{free_port()}"
    message = refused(address)
    assert address in message
    assert "ray status" in message


@pytest.mark.usefixtures("unconnected")
def test_ray_address_is_used_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{free_port()}")
    assert os.environ["RAY_ADDRESS"] in refused(None)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("address", ["head", "head:port", "head:99999"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    assert "HOST:PORT" in refused(address)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://10.0.0.5:10001", "does not run over a Ray client"),
        (f"{'a' * 64}.example:6379", "no such host name"),
        ("xn--ü:6379", "no Ray cluster at"),
    ],
)
def test_an_address_that_cannot_serve_is_one_line(address: str, message: str) -> None:
    assert message in refused(address)


@pytest.mark.usefixtures("unconnected")
@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_a_port_of_something_else_is_refused(answer: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(64)
                connection.sendall(answer)
                time.sleep(0 if answer else 2)  # without an answer: silent

        threading.Thread(target=serve, daemon=True).start()
        message = refused(f"127.0.0.1:{server.getsockname()[1]}")
    assert ("no answer" if not answer else "something else") in message


@pytest.mark.usefixtures("unconnected")
def test_auto_without_a_cluster_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nmore")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert "ray start --head" in refused("auto")


@pytest.mark.usefixtures("unconnected")
def test_auto_does_not_wait_for_a_cluster_that_is_gone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(f"{address}\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert address in refused("auto")


# A process that binds as a local Ray does, for Ray finds the node of a driver by its address.
JOIN_LOCAL = """
import sys, ray
from cacp_ray.distributed import internals
with internals.bound_to_loopback():
    ray.init(sys.argv[1], logging_level="error", _node_ip_address=internals.LOOPBACK)
print(int(ray.available_resources()["CPU"]))
"""


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("known", ["token", "no token", "another token"])
def test_a_local_ray_is_closed_to_processes_that_do_not_know_its_token(known: str) -> None:
    variables = {"RAY_AUTH_MODE": "token", "RAY_NUM_REDIS_GET_RETRIES": "1"}
    variables["RAY_AUTH_TOKEN"] = AuthenticationTokenLoader.instance().get_raw_token()
    if known == "no token":
        variables["RAY_AUTH_MODE"] = "disabled"
    elif known == "another token":
        variables["RAY_AUTH_TOKEN"] = "0" * 64
    result = subprocess.run(
        [sys.executable, "-c", JOIN_LOCAL, ray.get_runtime_context().gcs_address],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | variables,
    )
    if known == "token":
        assert (result.stdout, result.stderr) == ("2\n", "")
    else:
        assert result.returncode != 0
        assert result.stdout == ""
        assert "InvalidAuthToken" in result.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_a_local_ray_listens_on_the_loopback_address_alone() -> None:
    ray.get(ray.remote(lambda: None).remote())  # a worker listens too
    driver = psutil.Process()
    listening = {
        connection.laddr.ip
        for process in (driver, *driver.children(recursive=True))
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening
    assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


@pytest.mark.usefixtures("ray_cluster")
def test_connecting_again_changes_nothing() -> None:
    cluster.connect("127.0.0.1:1")
    assert ray.is_initialized()
    assert ray.cluster_resources()["CPU"] == 2


@pytest.mark.usefixtures("unconnected")
def test_auto_in_a_job_is_the_job_s_own_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("127.0.0.1:1\n")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert address in refused("auto")
