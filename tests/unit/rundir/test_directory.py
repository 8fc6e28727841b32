"""A run's folder survives a kill between any two writes."""

import dataclasses
import os
import re
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import read_json
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import SCHEMA, EpisodeRecord
from tests.unit.searching.test_archive import record

COLUMNS = [
    *("index", "score", "figures", "images", "seconds", "status", "error", "evaluator"),
    *("node", "attempt", "finished_at", "hits", "cached"),
    *("strategy", "rate", "keep_counts", "criterion", "macs", "params", "cost_kept", "reward"),
    *("is_answer", "top1", "top5", "loss"),
]


def rows(count, first=0):
    return [record(index, 1 + index % 9, 0.5) for index in range(first, first + count)]


@pytest.fixture
def run(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.compact()
    return run


def fill(run, records):
    for measurement in records:
        run.append(measurement)


def test_columns_are_the_contract(run):
    fill(run, rows(3))
    run.compact()
    table = pq.read_table(run.path / "episodes" / "part-00000.parquet")
    assert table.column_names == COLUMNS
    names = {field.name for field in dataclasses.fields(EpisodeRecord)}
    assert names | {"top1", "top5", "loss"} == set(COLUMNS)
    assert table.schema.equals(SCHEMA)
    assert str(table.schema.field("keep_counts").type).startswith("list<")


def test_records_read_back_equal_from_journal_and_parts(run):
    records = rows(7)
    fill(run, records[:3])
    run.compact()
    fill(run, records[3:5])
    run.compact()
    fill(run, records[5:])
    assert run.read_records() == records
    assert len(list((run.path / "episodes").iterdir())) == 2
    assert RunDirectory(run.path).read_records() == records


def test_the_order_recorded_is_kept(run):
    records = [rows(4)[i] for i in (2, 0, 3, 1)]
    fill(run, records[:2])
    run.compact()
    fill(run, records[2:])
    assert run.read_records() == records


def test_an_empty_journal_makes_no_part(run):
    run.compact()
    assert not (run.path / "episodes").exists()
    assert run.read_records() == []


def test_a_folder_without_measurements_reads_as_empty(tmp_path):
    assert RunDirectory(tmp_path / "absent").read_records() == []
    assert RunDirectory(tmp_path / "absent").find_checkpoint() is None


def test_a_journal_cut_anywhere_loses_only_the_line_that_is_cut(run):
    fill(run, rows(3))
    journal = run.path / "journal.jsonl"
    whole = journal.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole) + 1):
        journal.write_bytes(whole[:size])
        # A line that only lacks its end is whole.
        num_whole = sum(end - 1 <= size for end in ends)
        assert run.read_records() == rows(num_whole)


def test_a_torn_line_does_not_spoil_the_next(run):
    fill(run, rows(2))
    with (run.path / "journal.jsonl").open("a") as journal:
        journal.write('{"index": 2, "strat')
    again = RunDirectory(run.path)
    again.compact()
    fill(again, rows(1, first=2))
    assert again.read_records() == rows(3)


def test_a_broken_line_before_the_last_is_an_error_that_names_it(run):
    fill(run, rows(3))
    journal = run.path / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text(lines[0] + "oops\n" + lines[2])
    with pytest.raises(ArtifactError, match=r"journal\.jsonl: line 2"):
        run.read_records()


def test_a_broken_part_is_an_error_that_names_it(run):
    fill(run, rows(3))
    run.compact()
    part = run.path / "episodes" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet"):
        run.read_records()


def test_a_kill_between_part_and_truncation_neither_loses_nor_doubles_rows(run, monkeypatch):
    fill(run, rows(2))
    run.compact()
    fill(run, rows(3, first=2))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "truncate", kill)
        with pytest.raises(KeyboardInterrupt):
            run.compact()
    assert run.read_records() == rows(5)
    run.compact()
    fill(run, rows(1, first=5))
    run.compact()
    assert run.read_records() == rows(6)
    parts = sorted((run.path / "episodes").iterdir())
    assert sum(pq.read_metadata(part).num_rows for part in parts) == 6


def test_a_kill_before_the_part_has_its_name_loses_nothing(run, monkeypatch):
    fill(run, rows(3))

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            run.compact()
    assert run.read_records() == rows(3)


def save(run, told, text):
    def write(folder):
        assert list(folder.iterdir()) == []
        (folder / "deep").mkdir()
        (folder / "deep" / "state.txt").write_text(text)

    run.save_checkpoint(told, write)


def newest(run):
    checkpoint = run.find_checkpoint()
    return checkpoint and ((checkpoint[0] / "deep" / "state.txt").read_text(), checkpoint[1])


def test_the_newest_checkpoint_is_found_and_two_are_kept(run):
    for number in range(4):
        save(run, 10 * number, f"state {number}")
    assert newest(run) == ("state 3", 30)
    folders = sorted(p.name for p in (run.path / "checkpoints").iterdir() if p.is_dir())
    assert folders == ["checkpoint-000002", "checkpoint-000003"]
    latest = read_json(run.path / "checkpoints" / "LATEST.json")
    assert latest["checkpoints"][0]["name"] == "checkpoint-000003"
    assert latest["checkpoints"][0]["told"] == 30


def damage_by_cutting(folder):
    (folder / "deep" / "state.txt").write_text("stat")


def damage_by_changing(folder):
    (folder / "deep" / "state.txt").write_text("state X")


@pytest.mark.parametrize("damage", [shutil.rmtree, damage_by_cutting, damage_by_changing])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(run, damage):
    for number in range(3):
        save(run, number, f"state {number}")
    damage(run.path / "checkpoints" / "checkpoint-000002")
    assert newest(run) == ("state 1", 1)
    save(run, 7, "state 3")
    shutil.rmtree(run.path / "checkpoints" / "checkpoint-000003")
    assert newest(run) == ("state 1", 1)


def test_a_damaged_index_of_checkpoints_counts_as_none(run):
    save(run, 1, "state 0")
    (run.path / "checkpoints" / "LATEST.json").write_text('{"checkpo')
    assert run.find_checkpoint() is None
    save(run, 2, "state 1")
    assert newest(run) == ("state 1", 2)


@pytest.mark.parametrize("operation", ["write", "rename", "index"])
def test_a_kill_during_a_checkpoint_leaves_the_one_before(run, monkeypatch, operation):
    save(run, 1, "state 0")

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if operation == "rename":
            patch.setattr("pathlib.Path.rename", kill)
        if operation == "index":
            patch.setattr(os, "replace", kill)
        with pytest.raises(KeyboardInterrupt):
            run.save_checkpoint(2, kill if operation == "write" else lambda folder: None)
    assert newest(run) == ("state 0", 1)
    save(run, 3, "state 2")
    assert newest(run) == ("state 2", 3)
    assert not [p for p in (run.path / "checkpoints").iterdir() if p.name.startswith(".")]


def test_configuration_environment_and_model_are_written(run):
    run.write_config({"name": "x", "rates": [0.5]})
    run.write_environment({"seed": 1})
    run.write_model({"macs": 5})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == {"name": "x", "rates": [0.5]}
    assert read_json(run.path / "environment.json") == {"seed": 1}
    assert read_json(run.path / "model.json") == {"macs": 5}


def test_two_processes_do_not_search_in_one_folder(run):
    with (
        run.locked(),
        pytest.raises(ArtifactError, match="another process is searching"),
        RunDirectory(run.path).locked(),
    ):
        pass
    with RunDirectory(run.path).locked():
        pass


@pytest.mark.parametrize("write", [lambda run: run.append(rows(1, 5)[0]), RunDirectory.compact])
def test_a_folder_that_is_away_for_a_moment_loses_nothing(run, monkeypatch, write):
    fill(run, rows(5))
    away = run.path.with_name("away")
    run.path.rename(away)
    run.path.mkdir()  # the empty mount point

    def mount(seconds):
        if away.exists():
            shutil.rmtree(run.path)
            away.rename(run.path)

    monkeypatch.setattr("cacp_ray.io.files.time.sleep", mount)
    write(run)
    assert [row.index for row in run.read_records()][:5] == list(range(5))
    assert not away.exists()


@pytest.mark.parametrize("content", ['{"checkpoints": [{}]}', '{"checkpoints": "abc"}', "[1]"])
def test_a_latest_of_wrong_content_is_as_none(run, content):
    (run.path / "checkpoints").mkdir()
    (run.path / "checkpoints" / "LATEST.json").write_text(content)
    assert run.find_checkpoint() is None


@pytest.mark.parametrize(
    "change",
    [
        lambda table: table.drop_columns(["score"]),
        lambda table: table.rename_columns(
            ["order" if name == "criterion" else name for name in table.column_names]
        ),
    ],
    ids=["without score", "of an earlier version"],
)
def test_a_part_of_other_columns_is_one_line(run, change):
    fill(run, rows(2))
    run.compact()
    part = run.path / "episodes" / "part-00000.parquet"
    table = pq.read_table(part)
    pq.write_table(change(table), part)
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet: other columns"):
        run.read_records()


@pytest.mark.parametrize("value", ['"high"', "[1]", "{}"])
def test_a_line_with_a_value_of_another_type_is_named(run, value):
    fill(run, rows(2))
    journal = run.path / "journal.jsonl"
    first, second = journal.read_text().splitlines()
    bad = re.sub(r'"score": [^,]*', f'"score": {value}', first)
    assert bad != first
    journal.write_text(f"{bad}\n{second}\n")
    with pytest.raises(ArtifactError, match="line 1 is not a measurement"):
        run.read_records()
    journal.write_text(f"{second}\n{bad}\n")
    assert len(run.read_records()) == 1


def test_a_part_with_values_of_another_type_is_one_line(run):
    fill(run, rows(2))
    run.compact()
    part = run.path / "episodes" / "part-00000.parquet"
    table = pq.read_table(part)
    text = pa.array(["high", "low"])
    pq.write_table(table.set_column(table.column_names.index("score"), "score", text), part)
    with pytest.raises(ArtifactError, match="part-00000"):
        run.read_records()


@pytest.mark.parametrize("name", ["LATEST.json", "part-00000.parquet"])
def test_a_disk_that_fails_once_is_no_damage(run, monkeypatch, name):
    fill(run, rows(3))
    run.compact()
    for told in (1, 2):
        run.save_checkpoint(told, lambda folder: (folder / "state").write_text("x"))
    fill(run, rows(2, first=3))
    failed, opened = [], Path.open

    def fail_once(path, *args, **options):
        if path.name == name and not failed:
            failed.append(path)
            raise OSError(5, "Input/output error")
        return opened(path, *args, **options)

    monkeypatch.setattr(Path, "open", fail_once)
    monkeypatch.setattr("cacp_ray.io.files.time.sleep", lambda seconds: None)
    run.compact()
    run.save_checkpoint(3, lambda folder: (folder / "state").write_text("x"))
    assert failed
    assert len(list((run.path / "checkpoints").glob("checkpoint-*"))) == 2
    assert [row.index for row in run.read_records()] == list(range(5))
