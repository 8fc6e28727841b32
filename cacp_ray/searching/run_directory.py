"""The folder of a run: what is written when, so that a kill at any moment loses no measurement.

Measurements go to `journal.jsonl`, a line each. `compact` moves the journal into a Parquet part:
the part is renamed into place first, the journal is emptied second; a kill between both leaves
rows in both places, and `read_records` takes each index once. Checkpoints are folders that
are renamed into place and then named in `LATEST.json` with the size and hash of every file.
"""
# pyarrow has no complete types:
# pyright: basic

import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.measurement import Status, Subnet
from cacp_ray.files import keep_trying, write_file, write_json, write_yaml

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 1  # of checkpoints
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("strategy", pa.string()),
        ("rate", pa.float64()),
        ("keep_counts", pa.list_(pa.int64())),
        ("macs", pa.int64()),
        ("params", pa.int64()),
        ("cost_kept", pa.float64()),
        ("top1", pa.float64()),
        ("top5", pa.float64()),
        ("loss", pa.float64()),
        ("images", pa.int64()),
        ("reward", pa.float64()),
        ("seconds", pa.float64()),
        ("cached", pa.bool_()),
        ("status", pa.string()),
        ("evaluator", pa.string()),
        ("node", pa.string()),
        ("attempt", pa.int64()),
        ("finished_at", pa.float64()),
        ("error", pa.string()),
        ("order", pa.string()),
        ("hits", pa.string()),
    ]
)


@dataclass(frozen=True)
class EpisodeRecord:
    """One row of `episodes/`: a candidate and its measurement.

    Attributes:
        index: Of the candidate, unique in the run.
        strategy: Name of the strategy that proposed it.
        rate: The rate it was proposed for.
        keep_counts: Channels kept, one entry a group.
        macs: For one input.
        params: Number of parameters.
        cost_kept: Share of the whole network's cost, in (0, 1].
        top1: Share of images in [0, 1].
        top5: Share of images in [0, 1].
        loss: Mean cross-entropy in nats.
        images: Images scored.
        reward: What the strategy maximises.
        seconds: Spent scoring; 0 where it was answered from memory.
        cached: Whether it was answered from memory.
        status: `ok`, `failed` or `stopped`.
        evaluator: Name of the actor.
        node: Address of its machine.
        attempt: 1 for the first try.
        finished_at: Unix time.
        error: Reason of a failure, one line; or what was out of the ordinary in a success.
        order: Criterion of its importance order; empty for the run's.
        hits: Which images were right (`cacp_ray.evaluation.racing`); empty where not all were
            scored.
    """

    index: int
    strategy: str
    rate: float
    keep_counts: tuple[int, ...]
    macs: int
    params: int
    cost_kept: float
    top1: float
    top5: float
    loss: float
    images: int
    reward: float
    seconds: float
    cached: bool
    status: Status
    evaluator: str
    node: str
    attempt: int
    finished_at: float
    error: str
    order: str = ""
    hits: str = ""

    @property
    def subnet(self) -> Subnet:
        """What tells candidates apart."""
        return self.keep_counts, self.order


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
                found = [_record(row) for row in _read_part(part).to_pylist()]
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
        keep_trying(partial(self._save_checkpoint, told, write), self.path / "checkpoints")

    def _save_checkpoint(self, told: int, write: Callable[[Path], object]) -> None:
        folder = self.path / "checkpoints"
        before = self._read_latest()
        used = {entry["name"] for entry in before} | {p.name for p in folder.glob("checkpoint-*")}
        name = f"checkpoint-{max((int(old[-6:]) for old in used), default=-1) + 1:06d}"
        temporary = folder / f".{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        files = {
            str(file.relative_to(temporary)): {"size": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(temporary.rglob("*"))
            if file.is_file()
        }
        temporary.rename(folder / name)
        whole = [entry for entry in before if self._is_whole(entry)]
        entries = [{"name": name, "told": told, "files": files}, *whole[:1]]
        latest = {"schema_version": SCHEMA_VERSION, "checkpoints": entries}
        write_json(folder / "LATEST.json", latest)
        named = {entry["name"] for entry in entries}
        for old in folder.iterdir():
            if old.is_dir() and old.name not in named:
                shutil.rmtree(old)

    def find_checkpoint(self) -> tuple[Path, int] | None:
        """Folder of the newest whole checkpoint and how many records had been told; else None.

        Raises:
            ArtifactError: A newer cacp_ray wrote it, or it cannot be read now.
        """
        try:
            entries = self._read_latest()
        except OSError as error:
            raise ArtifactError(f"{self.path}: cannot be read now ({error}); try again") from error
        for entry in entries:
            if self._is_whole(entry):
                return self.path / "checkpoints" / entry["name"], entry["told"]
            logger.warning("%s: %s is damaged, going further back", self.path, entry["name"])
        return None

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
                record = _record(row)
                pa.RecordBatch.from_pylist([row], schema=SCHEMA)  # refuses values of other types
                records.append(record)
            except (ValueError, TypeError, KeyError) as error:
                if number == len(lines):
                    break  # cut short by a kill: this measurement never finished
                raise ArtifactError(
                    f"{self._journal}: line {number} is not a measurement; remove the line"
                ) from error
        return records

    def _read_latest(self) -> list[dict[str, Any]]:
        file = self.path / "checkpoints" / "LATEST.json"
        if not file.exists():
            return []
        content = file.read_bytes()  # a disk that fails is no damage
        try:
            latest = json.loads(content)
            version = latest.get("schema_version", SCHEMA_VERSION)
            entries = [
                {"name": str(each["name"]), "told": int(each["told"]), "files": dict(each["files"])}
                for each in (latest["checkpoints"] if version == SCHEMA_VERSION else ())
            ]
        except (KeyError, TypeError, ValueError, AttributeError):
            logger.warning("%s is damaged: the search restarts from its measurements", file)
            return []
        if version != SCHEMA_VERSION:
            raise ArtifactError(
                f"{file}: schema version {version}, this cacp_ray reads {SCHEMA_VERSION}; go on "
                "with the cacp_ray that wrote it"
            )
        return entries

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        folder = self.path / "checkpoints" / entry["name"]
        return all(
            (folder / name).is_file()
            and (folder / name).stat().st_size == expected["size"]
            and _sha256(folder / name) == expected["sha256"]
            for name, expected in entry["files"].items()
        )


def _record(row: dict[str, Any]) -> EpisodeRecord:
    values = dict(row)
    values["keep_counts"] = tuple(row["keep_counts"])
    return EpisodeRecord(**values)


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


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
