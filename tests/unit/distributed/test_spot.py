"""What the clouds' metadata services say about spot machines, and what the watcher does about it.

The services are made up, on loopback, after the clouds' documentation.
"""

import json
import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from cacp_ray.distributed import spot
from cacp_ray.errors import ConfigError


def in_a_minute():
    return datetime.now(UTC).replace(microsecond=0) + timedelta(seconds=60)


@contextmanager
def metadata(answer):
    """A service that answers `answer(method, path, headers)`: (status, text)."""

    class Handler(BaseHTTPRequestHandler):
        def reply(self):
            status, text = answer(self.command, self.path, self.headers)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(text.encode())

        do_GET = do_PUT = reply

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()


def aws(is_announced):
    def answer(method, path, headers):
        if path == "/latest/api/token":
            return (200, "secret") if method == "PUT" else (405, "")
        if headers.get("X-aws-ec2-metadata-token") != "secret":
            return 401, ""
        assert path == "/latest/meta-data/spot/instance-action"
        if not is_announced:
            return 404, ""
        when = in_a_minute().strftime("%Y-%m-%dT%H:%M:%SZ")
        return 200, json.dumps({"action": "terminate", "time": when})

    return answer


def gcp(is_preempted):
    def answer(method, path, headers):
        if headers.get("Metadata-Flavor") != "Google":
            return 403, ""
        return 200, "TRUE" if is_preempted else "FALSE"

    return answer


def azure(*events):
    def answer(method, path, headers):
        if headers.get("Metadata") != "true":
            return 400, ""
        if path.startswith("/metadata/scheduledevents"):
            return 200, json.dumps({"Events": [event() for event in events]})
        return 200, "worker_7"

    return answer


def event(kind, machine, has_time=True):
    def make():
        when = format_datetime(in_a_minute(), usegmt=True) if has_time else ""
        return {"EventType": kind, "Resources": [machine], "NotBefore": when}

    return make


@pytest.mark.parametrize(
    ("cloud", "answer", "expected"),
    [
        ("aws", aws(False), None),
        ("aws", aws(True), 60),
        ("gcp", gcp(False), None),
        ("gcp", gcp(True), 30),
        ("azure", azure(), None),
        ("azure", azure(event("Reboot", "worker_7")), None),
        ("azure", azure(event("Preempt", "worker_8")), None),
        ("azure", azure(event("Preempt", "worker_7")), 60),
        ("azure", azure(event("Preempt", "worker_7", has_time=False)), 30),
    ],
    ids=["aws none", "aws", "gcp none", "gcp", "azure none", "azure reboot", "azure other",
         "azure", "azure now"],
)  # fmt: skip
def test_a_notice_is_read_as_its_cloud_writes_it(cloud, answer, expected):
    with metadata(answer) as url:
        seconds = spot.read_notice(cloud, url)
    assert seconds is None if expected is None else seconds == pytest.approx(expected, abs=20)


def test_the_watcher_waits_outlives_a_silent_service_and_drains_once(caplog):
    asked = []

    def answer(method, path, headers):
        asked.append(path)
        if len(asked) < 4:
            return (200, "FALSE") if len(asked) != 2 else (503, "")
        return 200, "TRUE"

    drained = []
    with metadata(answer) as url:
        spot.watch("gcp", url, drained.append, poll_seconds=0.01)
    assert drained == [30.0]
    assert len(asked) == 4
    assert sum("does not answer" in record.message for record in caplog.records) == 1


@pytest.mark.parametrize(("cloud", "answer"), [("aws", aws(False)), ("azure", azure())])
def test_the_cloud_is_the_one_that_answers(cloud, answer, monkeypatch):
    with metadata(answer) as url:
        monkeypatch.setattr(spot, "METADATA", dict.fromkeys(spot.METADATA, url))
        assert spot.find_cloud() == cloud


def test_no_cloud_is_one_line(monkeypatch):
    monkeypatch.setattr(spot, "METADATA", dict.fromkeys(spot.METADATA, "http://127.0.0.1:9"))
    with pytest.raises(ConfigError, match="no metadata service of AWS, Google or Azure answers"):
        spot.find_cloud()


def test_a_cluster_that_refuses_is_one_line(monkeypatch):
    refused = SimpleNamespace(returncode=1, stdout="", stderr="Traceback\nno such node\n")
    monkeypatch.setattr(spot.subprocess, "run", lambda *arguments, **options: refused)
    message = r"Ray does not drain this node \(no such node\): is it part"
    with pytest.raises(ConfigError, match=message):
        spot.drain_this_node("127.0.0.1:9", 30, node="ab" * 28)
