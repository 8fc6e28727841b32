"""A mirror is whole at every moment, can be fetched elsewhere, and leaves other files alone."""

import json
import logging
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io import places
from cacp_ray.rundir import mirror
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.searching.loop import SearchLoop
from tests.unit.searching.test_loop import (
    COST_MODEL,
    RATES,
    ClimbingStrategy,
    Killed,
    ShuffledEvaluator,
    rows,
)


def push_whole(storage, folder):
    """Copies, waits, and returns whether the storage took the files."""
    storage.push(folder)
    if storage._thread is not None:
        storage._thread.join()
    if storage._failure is not None:
        raise storage._failure
    return storage._is_taken


def search(folder, storage=None, stop_at=None, *, push=push_whole):
    """A search in rounds that dies after `stop_at` checkpoints."""
    count = 0

    def copy():
        nonlocal count
        count += 1
        if storage is not None:
            push(storage, folder)
        if count == stop_at:
            raise Killed

    run = RunDirectory(folder)
    if not (folder / "config.yaml").exists():
        run.write_config({"name": "x"})
    loop = SearchLoop(
        ShuffledEvaluator(0),
        COST_MODEL,
        run,
        rates=RATES,
        evaluations=30,
        checkpoint_ticks=1,
        on_checkpoint=copy,
    )
    loop.run(ClimbingStrategy())
    if storage is not None:
        storage.finish(folder)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    search(folder)
    return rows(folder)


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("scheme", ["", "file://"])
@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_run_whose_machine_is_lost_goes_on_from_the_copy(
    tmp_path, uninterrupted, scheme, stop_at
):
    uri = f"{scheme}{tmp_path / 'copy'}"
    with pytest.raises(Killed):
        search(tmp_path / "lost", RunMirror(uri), stop_at)
    shutil.rmtree(tmp_path / "lost")
    again = RunMirror(uri)
    assert again.config
    again.pull(tmp_path / "new")
    assert RunDirectory(tmp_path / "new").find_checkpoint() is not None
    search(tmp_path / "new", again)
    assert rows(tmp_path / "new") == uninterrupted
    assert names(tmp_path / "copy") == names(tmp_path / "new")
    assert sum(name.endswith("loop.json") for name in names(tmp_path / "copy")) == 2


def test_what_was_fetched_is_not_copied_back(tmp_path, monkeypatch):
    """Statistics of a large network are hundreds of megabytes."""
    search(tmp_path / "run", RunMirror(str(tmp_path / "copy")))
    (tmp_path / "copy" / "statistics.safetensors").write_bytes(b"large")
    again = RunMirror(str(tmp_path / "copy"))
    again.pull(tmp_path / "new")
    put, done = again._put, []
    monkeypatch.setattr(
        again, "_put", lambda name, content: (done.append(name), put(name, content))
    )
    again.finish(tmp_path / "new")
    assert done == []
    (tmp_path / "new" / "report.html").write_text("new")
    again.finish(tmp_path / "new")
    assert done == ["report.html"]


@pytest.mark.parametrize("kill_at", range(0, 24, 3))
def test_a_copy_that_stops_anywhere_can_be_resumed(tmp_path, uninterrupted, monkeypatch, kill_at):
    copy = RunMirror(str(tmp_path / "copy"))
    put, calls = copy._put, iter(range(10_000))

    def dying(name, content):
        if next(calls) >= kill_at:
            raise Killed
        put(name, content)

    monkeypatch.setattr(copy, "_put", dying)
    with pytest.raises(Killed):
        search(tmp_path / "lost", copy)
    again = RunMirror(str(tmp_path / "copy"))
    again.pull(tmp_path / "new")
    search(tmp_path / "new", again)
    assert rows(tmp_path / "new") == uninterrupted


@pytest.mark.parametrize("hangs_at", ["config.yaml", "checkpoints/", "episodes/"])
def test_a_copy_that_hangs_holds_up_nothing_and_is_whole(
    tmp_path, uninterrupted, monkeypatch, hangs_at
):
    copy = RunMirror(str(tmp_path / "copy"))
    put, goes_on, hung = copy._put, threading.Event(), []

    def hanging(name, content):
        if name.startswith(hangs_at) and not hung:
            hung.append(name)
            assert goes_on.wait(60)
        put(name, content)

    monkeypatch.setattr(copy, "_put", hanging)
    with pytest.raises(Killed):  # the checkpoints in the hanging snapshot are gone by then
        search(tmp_path / "lost", copy, stop_at=5, push=RunMirror.push)
    assert hung
    goes_on.set()
    copy._thread.join()
    if hangs_at != "config.yaml":  # this file comes last in a first copy
        assert RunDirectory(tmp_path / "copy").find_checkpoint() is not None
    again = RunMirror(str(tmp_path / "copy"))
    again.pull(tmp_path / "new")
    search(tmp_path / "new", again, push=RunMirror.push)
    assert rows(tmp_path / "new") == uninterrupted
    assert names(tmp_path / "copy") == names(tmp_path / "new")


def test_a_slow_copy_is_waited_for_in_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.05)
    RunDirectory(tmp_path / "run").write_config({"name": "x"})
    copy = RunMirror(str(tmp_path / "copy"))
    put = copy._put
    monkeypatch.setattr(copy, "_put", lambda *file: (time.sleep(0.5), put(*file)))
    copy.push(tmp_path / "run")
    copy.finish(tmp_path / "run")
    assert names(tmp_path / "copy") == names(tmp_path / "run")


@pytest.mark.parametrize("is_begun", [True, False])
def test_a_copy_that_goes_nowhere_is_given_up_in_the_end(tmp_path, monkeypatch, is_begun):
    for name in ("PATIENCE_SECONDS", "FILE_SECONDS", "RETRY_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.05)
    RunDirectory(tmp_path / "run").write_config({"name": "x"})
    copy, goes_on = RunMirror(str(tmp_path / "copy")), threading.Event()
    monkeypatch.setattr(copy, "_put", lambda *_: goes_on.wait(60))
    if is_begun:
        copy.push(tmp_path / "run")
    with pytest.raises(ArtifactError, match="has not taken the last files"):
        copy.finish(tmp_path / "run")
    goes_on.set()


@pytest.mark.parametrize("push", [push_whole, RunMirror.push])
def test_a_run_directory_that_fails_for_a_moment_costs_nothing(
    tmp_path, uninterrupted, monkeypatch, caplog, push
):
    look, calls = mirror._Snapshot, iter(range(10_000))

    def failing(folder):
        if next(calls) in (1, 2):
            raise OSError(5, "Input/output error")
        return look(folder)

    monkeypatch.setattr(mirror, "_Snapshot", failing)
    with caplog.at_level(logging.WARNING):
        search(tmp_path / "run", RunMirror(str(tmp_path / "copy")), push=push)
    assert "run cannot be read now ([Errno 5] Input/output error)" in caplog.text
    assert rows(tmp_path / "copy") == uninterrupted


def test_files_that_vanish_are_passed_over(tmp_path, monkeypatch):
    run = tmp_path / "run"
    RunDirectory(run).write_config({"name": "x"})
    for name in ("before", "after"):
        (run / name).touch()
    copy, stat, put = RunMirror(str(tmp_path / "copy")), Path.stat, RunMirror._put

    def vanishing(path, **options):
        if path.name == "before" and sys._getframe(1).f_code.co_name == "_state":
            path.unlink(missing_ok=True)
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", vanishing)
    copy._put = lambda *file: ((run / "after").unlink(missing_ok=True), put(copy, *file))
    (run / "a").touch()
    assert push_whole(copy, run)
    assert names(tmp_path / "copy") == {"a", "config.yaml"}


def test_a_result_is_there_when_all_that_it_speaks_of_is(tmp_path, monkeypatch):
    run = tmp_path / "run"
    RunDirectory(run).write_config({"name": "x"})
    copy, put, order = RunMirror(str(tmp_path / "copy")), RunMirror._put, []
    push_whole(copy, run)
    for name in ("result.json", "subnets/rate-0.50/model.safetensors", "zebra", mirror.LATEST):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")
    RunDirectory(run).write_config({"name": "another"})
    monkeypatch.setattr(copy, "_put", lambda *file: (order.append(file[0]), put(copy, *file)))
    push_whole(copy, run)
    assert order[-3:] == ["result.json", mirror.LATEST, "config.yaml"]


def test_a_search_ends_where_another_copies_to_the_same_place(tmp_path):
    copy = RunMirror(str(tmp_path / "copy"))
    search(tmp_path / "other", RunMirror(str(tmp_path / "copy")))
    RunDirectory(tmp_path / "run").write_config({"name": "x"})
    copy.push(tmp_path / "run")
    copy._thread.join()
    with pytest.raises(ArtifactError, match="another process copies a run there"):
        copy.push(tmp_path / "run")


def test_storage_that_fails_for_a_while_costs_nothing(tmp_path, uninterrupted, monkeypatch, caplog):
    copy = RunMirror(str(tmp_path / "copy"))
    put, calls = copy._put, iter(range(10_000))

    def failing(name, content):
        if 8 <= next(calls) < 30:
            raise OSError(5, "Input/output error")
        put(name, content)

    monkeypatch.setattr(copy, "_put", failing)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.1)
    with caplog.at_level(logging.WARNING):
        search(tmp_path / "run", copy)
    assert "cannot be written now" in caplog.text
    assert names(tmp_path / "copy") == names(tmp_path / "run")
    assert rows(tmp_path / "copy") == uninterrupted


def test_storage_that_never_takes_the_last_files_is_an_error_that_says_where_they_are(
    tmp_path, monkeypatch
):
    copy = RunMirror(str(tmp_path / "copy"))
    RunDirectory(tmp_path / "run").write_config({"name": "x"})
    monkeypatch.setattr(mirror, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(copy, "_put", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ArtifactError, match=r"run: run the same command with --resume"):
        copy.finish(tmp_path / "run")


def test_what_else_is_there_stays(tmp_path):
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mine.txt").write_text("mine")
    search(tmp_path / "run", RunMirror(str(tmp_path / "copy")))
    assert (tmp_path / "copy" / "mine.txt").read_text() == "mine"


def test_an_older_folder_is_not_gone_on_with(tmp_path):
    with pytest.raises(Killed):
        search(tmp_path / "old", RunMirror(str(tmp_path / "copy")), 2)
    shutil.copytree(tmp_path / "old", tmp_path / "new")
    search(tmp_path / "new", RunMirror(str(tmp_path / "copy")))
    with pytest.raises(ArtifactError, match="older than"):
        RunMirror(str(tmp_path / "copy")).pull(tmp_path / "old")
    latest = json.loads((tmp_path / "new" / "checkpoints" / "LATEST.json").read_text())
    RunMirror(str(tmp_path / "copy")).pull(tmp_path / "new")
    assert json.loads((tmp_path / "copy" / "checkpoints" / "LATEST.json").read_text()) == latest


@pytest.mark.parametrize(
    "uri", ["ftp://host/x", "s4://bucket/x", "s3:/bucket/x", "gs:bucket/x", ""]
)
def test_an_unknown_kind_of_storage_is_refused(uri):
    with pytest.raises(ConfigError, match="write s3://BUCKET/FOLDER"):
        RunMirror(uri)


def test_a_place_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written to"):
        RunMirror(str(tmp_path / "file" / "run"))


def test_a_place_that_never_answers_is_refused(monkeypatch):
    class Silent:
        class FileSystem:
            @staticmethod
            def from_uri(_):
                time.sleep(5)

    monkeypatch.setattr(places, "CONNECT_SECONDS", 0.2)
    monkeypatch.setattr(places, "fs", Silent)
    with pytest.raises(ConfigError, match=r"no answer in 0 s"):
        RunMirror("gs://bucket/run")


@pytest.mark.parametrize("content", ["", "{}", '{"checkpoints": [1]}'])
def test_a_damaged_latest_here_or_there_is_one_line(tmp_path, content):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    search(run_dir)
    storage = RunMirror(str(copy))
    storage.finish(run_dir)
    (run_dir / "checkpoints" / "LATEST.json").write_text(content)
    with pytest.raises(ArtifactError, match="older than"):
        storage.pull(run_dir)
    (copy / "checkpoints" / "LATEST.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"LATEST\.json is damaged"):
        storage.pull(run_dir)


def test_a_checkpoint_of_an_earlier_life_is_not_taken_for_one_of_the_same_name(
    tmp_path, monkeypatch
):
    run_dir, copy = tmp_path / "run", tmp_path / "copy"
    RunDirectory(run_dir).write_config({"name": "x"})
    run = RunDirectory(run_dir)
    run.save_checkpoint(0, lambda folder: (folder / "state").write_text("aaa"))
    first = RunMirror(str(copy))
    put = first._put

    def dying(name, content):
        if name == mirror.LATEST:
            raise Killed
        put(name, content)

    monkeypatch.setattr(first, "_put", dying)
    with pytest.raises(Killed):
        first._copy(mirror._Snapshot(run_dir))
    shutil.rmtree(run_dir / "checkpoints")  # as if the driver's disk had not written it yet
    run.save_checkpoint(0, lambda folder: (folder / "state").write_text("bbb"))
    RunMirror(str(copy)).finish(run_dir)
    assert (copy / "checkpoints" / "checkpoint-000000" / "state").read_text() == "bbb"
    assert RunDirectory(copy).find_checkpoint() is not None


def test_two_drivers_do_not_copy_to_one_place(tmp_path):
    with pytest.raises(Killed):
        search(tmp_path / "one", RunMirror(str(tmp_path / "copy")), 2)
    first = RunMirror(str(tmp_path / "copy"))
    first.pull(tmp_path / "one")
    second = RunMirror(str(tmp_path / "copy"))
    second.pull(tmp_path / "two")
    search(tmp_path / "two", second)
    whole = names(tmp_path / "copy")
    with pytest.raises(ArtifactError, match=r"another process copies a run there.*one$"):
        search(tmp_path / "one", first)
    assert names(tmp_path / "copy") == whole


def test_a_copy_that_was_removed_is_made_whole_again(tmp_path, uninterrupted):
    copy = RunMirror(str(tmp_path / "copy"))
    with pytest.raises(Killed):
        search(tmp_path / "run", copy, 3)
    shutil.rmtree(tmp_path / "copy")
    search(tmp_path / "run", copy)
    assert names(tmp_path / "copy") == names(tmp_path / "run")
    assert rows(tmp_path / "copy") == uninterrupted


def test_what_could_not_be_removed_is_removed_later(tmp_path, monkeypatch):
    run_dir, copy = tmp_path / "run", RunMirror(str(tmp_path / "copy"))
    RunDirectory(run_dir).write_config({"name": "x"})
    run = RunDirectory(run_dir)
    refused = []

    def refuse_once(folder):
        if not refused:
            refused.append(folder)
            raise OSError("busy")
        remove(folder)

    remove = copy._remove
    monkeypatch.setattr(copy, "_remove", refuse_once)
    for told in range(4):
        run.save_checkpoint(told, lambda folder: (folder / "state").write_text("x"))
        push_whole(copy, run_dir)
    assert refused
    assert names(tmp_path / "copy") == names(run_dir)


def test_googles_client_gives_up_within_half_a_minute(monkeypatch):
    asked = []

    class Silent:
        class FileSystem:
            @staticmethod
            def from_uri(uri):
                asked.append(uri)
                raise OSError("no")

    monkeypatch.setattr(places, "fs", Silent)
    for uri in ("gs://bucket/run", "gs://bucket/run?project_id=x", "s3://bucket/run"):
        with pytest.raises(ConfigError, match="cannot be written"):
            RunMirror(uri)
    assert [uri.partition("retry_limit_seconds")[2] for uri in asked] == ["=30", "=30", ""]


def test_a_storage_that_cannot_be_asked_is_one_line(tmp_path, monkeypatch):
    copy = RunMirror(str(tmp_path / "copy"))

    def fail(_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(copy, "_info", fail)
    for ask in (lambda: copy.config, lambda: copy.pull(tmp_path / "run")):
        with pytest.raises(ArtifactError, match="cannot be read"):
            ask()


def test_a_run_without_checkpoints_is_copied_once(tmp_path, monkeypatch):
    run = tmp_path / "run"
    RunDirectory(run).write_config({"name": "x"})
    (run / "statistics.bin").write_text("large")
    copy, put, puts = RunMirror(str(tmp_path / "copy")), RunMirror._put, []
    monkeypatch.setattr(copy, "_put", lambda *file: (puts.append(file[0]), put(copy, *file)))
    push_whole(copy, run)
    push_whole(copy, run)
    assert sorted(puts) == ["config.yaml", "statistics.bin"]
