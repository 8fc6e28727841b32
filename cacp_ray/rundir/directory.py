"""The folder of a run, written so that a kill at any moment loses no measurement.

Each measurement is a line of `journal.jsonl`. `compact` moves the journal into a Parquet part: the
part is renamed into place first, and the journal is emptied second. A kill in between leaves rows
in both places, so `read_records` takes each index once.
"""
# pyarrow has no complete types:
# pyright: basic

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
from cacp_ray.io.files import keep_trying, parse_json, write_file, write_json, write_yaml
from cacp_ray.io.jsonl import append_line, read_journal
from cacp_ray.io.schema import Content, read_checked
from cacp_ray.rundir.checkpoints import find_checkpoint, save_checkpoint
from cacp_ray.rundir.records import SCHEMA, EpisodeRecord, as_row, read_record
from cacp_ray.rundir.schema import ResultFile

logger = logging.getLogger(__name__)

JOURNAL = "journal.jsonl"


class RunDirectory:
    """One run's folder, which one process at a time may write."""

    def __init__(self, path: Path) -> None:
        """Opens a folder; nothing is created before the first write."""
        self.path = path
        self._journal = path / JOURNAL
        self._size: int | None = None  # size of the journal after this process's last write

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from searching in this folder.

        Raises:
            ArtifactError: Another process is searching there.
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

        Call `compact` once before the first call, because a kill may have left half a line. Storage
        that fails or is away is tried again for a while, and the evaluators work on.

        Raises:
            ArtifactError: The storage fails for longer.
        """
        line = json.dumps(as_row(record))

        def write() -> None:
            size = self._check_size()
            if self._size is not None and size > self._size:
                os.truncate(self._journal, self._size)  # drops what a failed try has left
            self._size = append_line(self._journal, line)

        keep_trying(write, self._journal)

    def read_records(self) -> list[EpisodeRecord]:
        """All measurements in the order of recording, each index once.

        Raises:
            ArtifactError: A part or a line before the last cannot be read.
        """
        # Read the journal first: a running search may move its rows into a part in between.
        journal = self._read_journal()
        stored: list[EpisodeRecord] = []
        for part in self._parts():
            try:
                stored += [read_record(row) for row in _read_part(part).to_pylist()]
            except (KeyError, TypeError, ValueError) as error:
                raise ArtifactError(
                    f"{part}: other columns than those of measurements; restore it from a copy, or "
                    "start again in a new folder"
                ) from error
        records: dict[int, EpisodeRecord] = {}
        for record in stored + journal:
            records.setdefault(record.index, record)
        return list(records.values())

    def compact(self) -> None:
        """Moves the journal's rows into a new part, and empties the journal.

        Raises:
            ArtifactError: The storage keeps failing.
        """
        keep_trying(self._compact, self._journal)

    def _check_size(self) -> int:
        """Size of the journal; an empty folder may show in its place while its storage is away.

        Raises:
            OSError: The journal is shorter than this process left it, so `keep_trying` waits.
        """
        size = self._journal.stat().st_size if self._journal.exists() else 0
        if self._size is not None and size < self._size:
            raise OSError("it has lost measurements; is its storage mounted?")
        return size

    def _compact(self) -> None:
        self._check_size()
        rows = self._read_journal()
        parts = self._parts()
        # Only the last part can hold rows that are still in the journal.
        known = set(_read_indices(parts[-1])) if parts else set()
        new = [as_row(row) for row in rows if row.index not in known]
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
        """Saves a checkpoint that `write` fills; it runs again where the storage fails.

        Raises:
            ArtifactError: The storage keeps failing.
        """
        folder = self.path / "checkpoints"
        keep_trying(partial(save_checkpoint, folder, told, write), folder)

    def find_checkpoint(self) -> tuple[Path, int] | None:
        """Folder of the newest whole checkpoint, and how many records had been told; else None."""
        return find_checkpoint(self.path / "checkpoints")

    def _parts(self) -> list[Path]:
        return sorted((self.path / "episodes").glob("part-*.parquet"))

    def _read_journal(self) -> list[EpisodeRecord]:
        return read_journal(self._journal, "a measurement", _parse_line)


def read_result(run_dir: Path, kind: type[Content] = ResultFile) -> dict[str, Any]:
    """Content of a run's result.json, as far as `kind` says what must be there.

    Raises:
        ArtifactError: The search has not ended, or the file is damaged.
    """
    file = run_dir / "result.json"
    if not file.exists():
        raise ArtifactError(
            f"{run_dir} has no result.json: finish the search with `cacp-ray search --resume`"
        )
    return read_checked(file, kind)


def _parse_line(line: bytes) -> EpisodeRecord:
    row = parse_json(line)
    record = read_record(row)
    pa.RecordBatch.from_pylist([row], schema=SCHEMA)  # refuses values of other types
    return record


def _read_part(part: Path) -> pa.Table:
    try:
        table = pq.ParquetFile(part).read(columns=SCHEMA.names)
        return table.select(SCHEMA.names).cast(SCHEMA)
    except (OSError, pa.ArrowException) as error:
        raise ArtifactError(
            f"{part}: not a readable Parquet file; restore it from a copy, or start again in a "
            "new folder"
        ) from error


def _read_indices(part: Path) -> list[int]:
    """Indices of a part's rows; lets OSError through, because `keep_trying` waits for storage."""
    try:
        return pq.ParquetFile(part.open("rb")).read(columns=["index"])["index"].to_pylist()
    except (pa.ArrowException, KeyError) as error:
        raise ArtifactError(
            f"{part}: not a readable Parquet file; restore it from a copy"
        ) from error


def _write_durably(path: Path, table: pa.Table) -> None:
    # The journal is emptied right after, so the part has to be on the disk.
    with path.open("wb") as file:
        pq.write_table(table, file)
        file.flush()
        os.fsync(file.fileno())
