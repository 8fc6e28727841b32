"""One driver at a time trains into a storage, and the last one leaves no checkpoints there."""

import logging
import time

import pytest

from cacp_ray.errors import ArtifactError
from cacp_ray.rundir import holding
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import SIGN, RunMirror
from cacp_ray.workflows.storage import make_push, training_into


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(holding, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(holding, "WATCH_SECONDS", 1.0)


@pytest.fixture
def run(tmp_path):
    RunDirectory(tmp_path / "run").write_config({"name": "x"})
    return tmp_path / "run"


def wait_until(is_true):
    deadline = time.monotonic() + 30
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def make_trials(storage):
    for name in ("rate-0.3/checkpoint_000001/state.pt", "rate-0.3/result.json"):
        file = storage / "trials/finetune" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x")
    workers = storage / "trials/finetune/rate-0.3/workers/checkpoint_2026-01-01/state.pt"
    workers.parent.mkdir(parents=True)
    workers.write_text("x")


def test_a_second_driver_is_refused_while_the_first_lives(tmp_path, run):
    first, second = RunMirror(str(tmp_path / "far")), RunMirror(str(tmp_path / "far"))
    with first.held():
        with (
            pytest.raises(ArtifactError, match="trains into it: wait for it, or end") as caught,
            second.held(),
        ):
            pass
        assert "\n" not in str(caught.value)
        first.push(run)  # the first does not notice
        first.finish(run)


def test_after_a_driver_that_ended_nobody_waits(tmp_path, caplog):
    with RunMirror(str(tmp_path / "far")).held():
        assert (tmp_path / "far" / SIGN).exists()
    assert not (tmp_path / "far" / SIGN).exists()
    with caplog.at_level(logging.INFO), RunMirror(str(tmp_path / "far")).held():
        pass
    assert not caplog.records


def test_a_driver_that_ends_while_it_is_watched_makes_room(tmp_path):
    signs = iter([b'{"driver": "other"}', b'{"driver": "other"}', None, None])
    hold = holding.Hold("far", lambda: next(signs, None), lambda content: None)
    hold.release()


def test_after_a_driver_that_was_killed_another_goes_on(tmp_path, caplog):
    sign = tmp_path / "far" / SIGN
    sign.parent.mkdir(parents=True)
    sign.write_text('{"driver": "dead", "host": "node-7", "process": 12, "beat": 3}')
    with caplog.at_level(logging.INFO), RunMirror(str(tmp_path / "far")).held():
        assert "dead" not in sign.read_text()
    assert "whether a driver on node-7 (process 12) lives" in caplog.text
    assert not sign.exists()


def test_a_damaged_sign_is_that_of_a_dead_driver(tmp_path):
    sign = tmp_path / "far" / SIGN
    sign.parent.mkdir(parents=True)
    sign.write_bytes(b"\xff{")
    with RunMirror(str(tmp_path / "far")).held():
        assert b"driver" in sign.read_bytes()


@pytest.mark.parametrize("how", ["a report", "the end"])
def test_a_driver_that_was_taken_for_dead_ends_with_one_line(tmp_path, run, how):
    first = RunMirror(str(tmp_path / "far"))
    push = make_push(first, run)
    push()  # the next one copies nothing for half a minute
    sign = tmp_path / "far" / SIGN
    other = '{"driver": "other", "host": "node-8", "process": 4, "beat": 0}'
    with first.held():
        first.push(run)

        def is_noticed():  # the first may put its sign once more, between reading and writing
            sign.write_text(other)
            return first._hold._failure is not None

        wait_until(is_noticed)
        with pytest.raises(ArtifactError, match=r"node-8 .* trains into it too: end") as caught:
            push() if how == "a report" else first.finish(run)
    assert "\n" not in str(caught.value)
    assert sign.read_text() == other


def test_a_storage_that_fails_for_a_moment_costs_nothing(tmp_path, run, monkeypatch):
    first = RunMirror(str(tmp_path / "far"))
    put, failed = first._put, []

    def failing(name, content):
        if name == SIGN and len(failed) < 3:
            failed.append(name)
            raise OSError(5, "Input/output error")
        put(name, content)

    with first.held():
        monkeypatch.setattr(first, "_put", failing)
        first._hold._put = lambda content: failing(SIGN, content)
        wait_until(lambda: len(failed) == 3)
        (tmp_path / "far" / SIGN).unlink()
        wait_until((tmp_path / "far" / SIGN).exists)
        first.finish(run)


def test_checkpoints_go_once_the_results_are_there_and_logs_stay(tmp_path, run):
    storage = tmp_path / "far"
    make_trials(storage)
    with training_into(RunMirror(str(storage)), run):
        pass
    left = {str(p.relative_to(storage)) for p in storage.rglob("*") if p.is_file()}
    assert left == {"config.yaml", "trials/finetune/rate-0.3/result.json"}


def test_checkpoints_stay_where_a_training_did_not_end(tmp_path, run):
    storage = tmp_path / "far"
    make_trials(storage)
    with pytest.raises(KeyboardInterrupt), training_into(RunMirror(str(storage)), run):
        raise KeyboardInterrupt
    assert (storage / "trials/finetune/rate-0.3/checkpoint_000001/state.pt").exists()
    assert not (storage / SIGN).exists()
