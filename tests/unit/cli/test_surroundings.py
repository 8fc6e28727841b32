"""Terminals that are not UTF-8, full disks, readers that go away, and too little memory."""

import errno
import io
import logging
import sys

import pytest
import torch

from cacp_ray.cli import main
from cacp_ray.errors import is_out_of_memory
from cacp_ray.io.files import check_writable, write_file, write_text
from cacp_ray.workflows.analyze import analyze


def call(monkeypatch, *arguments):
    """As the fixture `run` does, without its own standard output and error."""
    level = logging.getLogger("cacp_ray").level
    monkeypatch.setattr(sys, "argv", ["cacp-ray", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    logging.getLogger("cacp_ray").setLevel(level)
    return caught.value.code


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    errors = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(errors, encoding))
    assert call(monkeypatch, "evaluate", "runs/\N{GREEK SMALL LETTER ALPHA}\udc80") == 2
    sys.stderr.flush()
    assert errors.getvalue().count(b"\n") == 1
    assert b"runs/" in errors.getvalue()


class Full(io.StringIO):
    """A file on a disk that takes no more."""

    def flush(self):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_standard_output_is_named(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        code = call(patch, "--help")
    err = capsys.readouterr().err
    assert code == 1
    assert err.startswith("cacp-ray: standard output cannot be read or written (No space left")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (OSError(errno.EROFS, "Read-only file system", "runs/x"), 1, "runs/x cannot be read or"),
        (MemoryError("no room"), 1, "memory ran out (no room): free some"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "memory ran out"),
    ],
)
def test_what_the_machine_lacks_is_one_line(monkeypatch, run, error, code, message):
    def fail(run_dir):
        raise error

    monkeypatch.setattr("cacp_ray.config.saved.read_run_config", fail)
    found, _, err = run("report", "x")
    assert found == code
    assert message in err
    assert err.count("\n") == 1


class Greedy(torch.nn.Conv2d):
    """Runs out of memory at the forward pass of that number."""

    def __init__(self, number):
        super().__init__(3, 8, 1)
        self.number = number

    def forward(self, x):
        self.number -= 1
        if self.number == 0:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
        return super().forward(x)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_too_little_memory_is_no_fault_of_the_network(number):
    net = torch.nn.Sequential(Greedy(number), torch.nn.ReLU(), torch.nn.Conv2d(8, 2, 1))
    with pytest.raises(RuntimeError, match="can't allocate memory") as caught:
        analyze(net, torch.zeros(1, 3, 8, 8))
    assert is_out_of_memory(caught.value)


def test_a_failed_write_names_the_file_and_leaves_the_old_one(tmp_path):
    file = tmp_path / "a" / "b.json"
    write_text(file, "old")

    def fail(path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: .*b\.json"):
        write_file(file, fail)
    assert [path.name for path in file.parent.iterdir()] == ["b.json"]
    assert file.read_text() == "old"


def test_text_with_bytes_of_a_file_name_is_written(tmp_path):
    write_text(tmp_path / "x", "a\udc80\N{GREEK SMALL LETTER ALPHA}")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "a\\udc80\N{GREEK SMALL LETTER ALPHA}"


def test_trying_a_folder_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b")
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
