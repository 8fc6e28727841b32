import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ray

from cacp_ray.distributed import cluster
from cacp_ray.errors import ConfigError

pytestmark = pytest.mark.ray

JOIN = """
import sys
from cacp_ray.distributed import cluster
cluster.connect(sys.argv[1] or None)
print(int(cluster.ray.available_resources()["CPU"]))
cluster.disconnect()
"""


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


@pytest.mark.usefixtures("ray_cluster")
def test_a_second_process_joins_quietly() -> None:
    address = ray.get_runtime_context().gcs_address
    result = subprocess.run(
        [sys.executable, "-c", JOIN, address],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.stdout == "2\n"
    assert result.stderr == ""


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
