"""A line that a kill cut short costs no other line."""

import json

import pytest

from cacp_ray.errors import ArtifactError
from cacp_ray.io.jsonl import append_line, read_journal, read_lines


def test_no_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "absent") == ([], {})
    assert read_journal(tmp_path / "absent", "a row") == []


def test_a_line_after_one_that_was_cut_short_is_whole(tmp_path):
    path = tmp_path / "rows.jsonl"
    for number in range(3):
        assert append_line(path, json.dumps(number)) == path.stat().st_size
        append_line(path, '{"cut')
        path.write_bytes(path.read_bytes()[:-1])
    rows, damaged = read_lines(path)
    assert rows == [0, 1, 2]
    assert list(damaged) == [2, 4, 6]


def test_only_the_last_line_of_a_journal_may_be_damaged(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('1\n2\n{"cut')
    assert read_journal(path, "a row") == [1, 2]
    append_line(path, "3")
    with pytest.raises(ArtifactError, match="line 3 is not a row; remove the line"):
        read_journal(path, "a row")


def test_a_write_that_is_cut_short_by_a_full_disk_is_an_error(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_line(path, "1")
    with path.open("ab+", buffering=0) as opened:
        left = iter([5])

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def __getattr__(self, name):
                return getattr(opened, name)

            def write(self, line):
                if (size := next(left, None)) is None:
                    raise OSError(28, "No space left on device")
                return opened.write(line[:size])

        monkeypatch.setattr(type(path), "open", lambda *_, **__: Full())
        with pytest.raises(OSError, match="No space"):
            append_line(path, json.dumps("long enough"))
    monkeypatch.undo()
    append_line(path, "2")
    assert read_lines(path)[0] == [1, 2]


def test_a_line_that_cannot_be_parsed_is_damaged(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xff\n{"x": 1}\n{}\n[]\n')
    rows, damaged = read_lines(path, lambda line: json.loads(line)["x"])
    assert rows == [1]
    assert {number: type(error) for number, error in damaged.items()} == {
        1: UnicodeDecodeError, 3: KeyError, 4: TypeError,
    }  # fmt: skip
