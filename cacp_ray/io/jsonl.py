"""Files of JSON lines that grow a line at a time; a kill may cut the last line short."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import parse_json

Row = TypeVar("Row")


def append_line(path: Path, text: str) -> int:
    """Adds a line in one write and returns the size of the file.

    The line survives the end of this process. It never continues a line that a kill cut short, and
    other processes may append at the same time.

    Raises:
        OSError: The storage does not take the line; a part of it may be there.
    """
    line = text.encode() + b"\n"
    with path.open("ab+", buffering=0) as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        while line:  # a full disk takes a part, and then raises
            line = line[file.write(line) :]
        return file.tell()


def read_lines(
    path: Path, parse: Callable[[bytes], Row] = parse_json
) -> tuple[list[Row], dict[int, Exception]]:
    """The readable rows, and what is wrong with every other line by its number, from 1.

    There is no line where there is no file. `parse` turns a line into a row, and raises ValueError,
    KeyError or TypeError where it is none.
    """
    rows: list[Row] = []
    damaged: dict[int, Exception] = {}
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse(line))
        except (ValueError, KeyError, TypeError) as error:
            damaged[number] = error
    return rows, damaged


def read_journal(
    path: Path, what: str = "JSON", parse: Callable[[bytes], Row] = parse_json
) -> list[Row]:
    """Reads a file whose last line alone may be cut short, and leaves that line out.

    Raises:
        ArtifactError: An earlier line is damaged.
    """
    rows, damaged = read_lines(path, parse)
    last = len(rows) + len(damaged)
    for number, error in damaged.items():
        if number < last:
            raise ArtifactError(f"{path}: line {number} is not {what}; remove the line") from error
    return rows
