"""Driver and cluster agree on a token before Ray connects, or one line says what differs."""

import os

import pytest

from cacp_ray.distributed import cluster
from cacp_ray.distributed.cluster import AUTH_MODE
from cacp_ray.errors import ConfigError

NONE, RIGHT, WRONG = "none", "that of the cluster", "another"


def agree(monkeypatch, *, asks: bool, mode: str | None, token: str) -> str:
    def is_let_in(address: str, kind: str) -> bool:
        assert kind == "disabled" or token != NONE  # Ray would end the process
        return not asks or (kind == "token" and token == RIGHT)

    monkeypatch.setattr(cluster, "is_let_in", is_let_in)
    monkeypatch.setattr(cluster, "has_token", lambda: token != NONE)
    monkeypatch.delenv(AUTH_MODE, raising=False)
    if mode is not None:
        monkeypatch.setenv(AUTH_MODE, mode)
    return cluster._agree_on_token("10.0.0.5:6379")


@pytest.mark.parametrize("token", [NONE, RIGHT, WRONG])
@pytest.mark.parametrize("mode", [None, "disabled"])
def test_no_token_is_sent_where_none_is_asked_for(monkeypatch, mode, token):
    """With one, Ray connects and every actor dies at once."""
    assert agree(monkeypatch, asks=False, mode=mode, token=token) == "disabled"


@pytest.mark.parametrize("mode", [None, "token", "TOKEN"])
def test_the_token_is_sent_where_one_is_asked_for(monkeypatch, mode):
    assert agree(monkeypatch, asks=True, mode=mode, token=RIGHT) == "token"


@pytest.mark.parametrize(
    ("asks", "mode", "token", "message"),
    [
        (False, "token", RIGHT, "asks for no token, but RAY_AUTH_MODE=token is set here"),
        (True, "disabled", RIGHT, "asks for a token, but RAY_AUTH_MODE=disabled is set here"),
        (True, None, NONE, "asks for a token, and this machine has none .*copy the head's"),
        (True, "token", NONE, "asks for a token, and this machine has none .*copy the head's"),
        (True, None, WRONG, "has another token than this machine .*copy the head's"),
        (True, "token", WRONG, "has another token than this machine .*copy the head's"),
    ],
)
def test_what_differs_is_one_line_with_the_next_step(monkeypatch, asks, mode, token, message):
    with pytest.raises(ConfigError, match=message) as caught:
        agree(monkeypatch, asks=asks, mode=mode, token=token)
    assert "10.0.0.5:6379" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_head_that_fails_to_answer_is_one_line(monkeypatch):
    def fail(address: str, kind: str) -> bool:
        raise RuntimeError("version 3\nmore")

    monkeypatch.setattr(cluster, "is_let_in", fail)
    with pytest.raises(ConfigError, match=r"does not answer as a head should \(version 3\): check"):
        cluster._agree_on_token("10.0.0.5:6379")


@pytest.mark.parametrize("fails", [True, False])
def test_the_environment_is_as_before_once_the_cluster_is_left(monkeypatch, fails):
    seen = []

    def init(target: str, **options: object) -> None:
        seen.append(os.environ[AUTH_MODE])
        if fails:
            raise ConfigError("no")

    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.setattr(cluster, "check_address", lambda address: address)
    monkeypatch.setattr(cluster, "_agree_on_token", lambda address: "token")
    monkeypatch.setattr(cluster, "_init", init)
    monkeypatch.delenv(AUTH_MODE, raising=False)
    if fails:
        with pytest.raises(ConfigError):
            cluster.connect("10.0.0.5:6379")
    else:
        cluster.connect("10.0.0.5:6379")
        cluster.disconnect()
    assert seen == ["token"]
    assert AUTH_MODE not in os.environ
