"""The folder of a run: what is written when, so that a kill at any moment loses no measurement.

Measurements go to `journal.jsonl`, a line each. `compact` moves the journal into a Parquet part:
the part is renamed into place first, the journal is emptied second; a kill between both leaves
rows in both places, and `read_records` takes each index once.
"""
# pyarrow has no complete types:
# pyright: basic

import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cacp_ray.errors import ArtifactError
from cacp_ray.files import keep_trying, write_file, write_json, write_yaml
from cacp_ray.searching.checkpoints import find_checkpoint, save_checkpoint
from cacp_ray.searching.records import SCHEMA, EpisodeRecord, read_record

logger = logging.getLogger(__name__)


class RunDirectory:
    """Reads and writes one run's folder, which one process at a time may write."""

    def __init__(self, path: Path) -> None:
        """Opens a folder; nothing is created before the first write."""
        self.path = path
        self._journal = path / "journal.jsonl"
        self._size: int | None = None  # of the journal, as this process has left it

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from searching in this folder, until the end of this one.

        Raises:
            ArtifactError: Another process does.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArtifactError(
                    f"{self.path}: another process is searching there: wait for it or end it, or "
                    "choose another --run-dir"
                ) from error
            except OSError as error:
                logger.debug("%s cannot be locked: %s", self.path, error)  # some network disks
            yield
        finally:
            os.close(folder)

    def write_config(self, config: dict[str, Any]) -> None:
        """Writes the resolved configuration."""
        write_yaml(self.path / "config.yaml", config)

    def write_environment(self, environment: dict[str, Any]) -> None:
        """Writes versions, hardware, commit and seed."""
        write_json(self.path / "environment.json", environment)

    def write_model(self, model: dict[str, Any]) -> None:
        """Writes the description of the base model."""
        write_json(self.path / "model.json", model)

    def append(self, record: EpisodeRecord) -> None:
        """Adds a measurement to the journal, where it survives the end of this process.

        `compact` once before the first: a kill may have left a line without an end. Storage that
        fails, or is away, is tried again for a while; the evaluators work on.

        Raises:
            ArtifactError: It fails for longer.
        """
        line = json.dumps(dataclasses.asdict(record)).encode() + b"\n"

        def write() -> None:
            with self._journal.open("ab") as journal:
                self._check_size(there := journal.tell())
                size = there if self._size is None else self._size
                journal.truncate(size)  # what an earlier try has left
                journal.write(line)
            self._size = size + len(line)

        keep_trying(write, self._journal)

    def read_records(self) -> list[EpisodeRecord]:
        """All measurements in the order recorded, each index once.

        Raises:
            ArtifactError: A part or a line before the last cannot be read.
        """
        # The journal first: a running search may move its rows into a part in between.
        journal = self._read_journal()
        records: dict[int, EpisodeRecord] = {}
        for part in self._parts():
            try:
                found = [read_record(row) for row in _read_part(part).to_pylist()]
            except (KeyError, TypeError) as error:
                raise ArtifactError(
                    f"{part}: other columns than those of measurements; restore it from a copy, or "
                    "start again in a new folder"
                ) from error
            for record in found:
                records.setdefault(record.index, record)
        for record in journal:
            records.setdefault(record.index, record)
        return list(records.values())

    def compact(self) -> None:
        """Moves the journal's rows into a new part; the journal is empty afterwards.

        Raises:
            ArtifactError: The storage fails for long.
        """
        keep_trying(self._compact, self._journal)

    def _check_size(self, there: int) -> None:
        """Waits, by `keep_trying`, for a folder that is away: an empty one may show in its place.

        Raises:
            OSError: The journal is shorter than this process has left it.
        """
        if self._size is not None and there < self._size:
            raise OSError("it has lost measurements; is its storage mounted?")

    def _compact(self) -> None:
        self._check_size(self._journal.stat().st_size if self._journal.exists() else 0)
        rows = self._read_journal()
        parts = self._parts()
        # Only the last part can hold rows that are still in the journal.
        known = set(_read_indices(parts[-1])) if parts else set()
        new = [dataclasses.asdict(row) for row in rows if row.index not in known]
        if new:
            table = pa.Table.from_pylist(new, schema=SCHEMA)
            number = int(parts[-1].stem.removeprefix("part-")) + 1 if parts else 0
            part = self.path / "episodes" / f"part-{number:05d}.parquet"
            write_file(part, lambda path: _write_durably(path, table))
        self.path.mkdir(parents=True, exist_ok=True)
        self._journal.touch()
        os.truncate(self._journal, 0)
        self._size = 0

    def save_checkpoint(self, told: int, write: Callable[[Path], object]) -> None:
        """Saves a checkpoint and drops all but this one and the one before.

        Args:
            told: How many of `read_records` the strategy had been told.
            write: Fills an empty folder; called again where the storage fails.

        Raises:
            ArtifactError: The storage fails for long.
        """
        folder = self.path / "checkpoints"
        keep_trying(partial(save_checkpoint, folder, told, write), folder)

    def find_checkpoint(self) -> tuple[Path, int] | None:
        """Folder of the newest whole checkpoint and how many records had been told; else None.

        Raises:
            ArtifactError: A newer cacp_ray wrote it, or it cannot be read now.
        """
        return find_checkpoint(self.path / "checkpoints")

    def _parts(self) -> list[Path]:
        return sorted((self.path / "episodes").glob("part-*.parquet"))

    def _read_journal(self) -> list[EpisodeRecord]:
        if not self._journal.exists():
            return []
        lines = self._journal.read_bytes().splitlines()
        records: list[EpisodeRecord] = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                record = read_record(row)
                pa.RecordBatch.from_pylist([row], schema=SCHEMA)  # refuses values of other types
                records.append(record)
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break  # cut short by a kill: this measurement never finished
                raise ArtifactError(
                    f"{self._journal}: line {number} is not a measurement; remove the line"
                ) from error
        return records


def _read_part(part: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(part).read(columns=SCHEMA.names)
        return table.cast(pa.schema([SCHEMA.field(name) for name in table.column_names]))
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{part}: not a readable Parquet file; restore it from a copy, or start again in a "
            "new folder"
        ) from error


def _read_indices(part: Path) -> list[int]:
    """Unlike `_read_part` it lets OSError through: storage that fails now may be back soon."""
    try:
        return pq.ParquetFile(part.open("rb")).read(columns=["index"])["index"].to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise ArtifactError(
            f"{part}: not a readable Parquet file; restore it from a copy"
        ) from error


def _write_durably(path: Path, table: pa.Table) -> None:
    # The journal's copy is dropped right after, so this one has to be on the disk.
    with path.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
