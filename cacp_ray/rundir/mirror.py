"""A mirror of a run on shared or object storage, from which the run can go on elsewhere.

The run directory stays on the driver's disk, and its new files are copied after every checkpoint.
Object stores cannot rename, so the order of the copies does what renaming does on a disk. Episode
parts and checkpoints go first. `checkpoints/LATEST.json`, which names whole checkpoints with the
hash of every file, goes after them, and only then are the checkpoints removed that it no longer
names. Each file is one put, which an object store shows whole or not at all. Where a driver is
killed in between, the mirror is as it was before, or it holds more measurements than its checkpoint
knows; a resumed search replays those.
"""
# pyarrow has no complete types:
# pyright: basic

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import yaml
from pyarrow import fs

from cacp_ray.errors import ArtifactError, ConfigError, one_line
from cacp_ray.io.files import parse_json, write_file
from cacp_ray.io.places import open_writable
from cacp_ray.rundir.directory import JOURNAL
from cacp_ray.rundir.holding import Hold

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
FILE_SECONDS = 600.0  # for one file to go through
RETRY_SECONDS = 5.0
LATEST = "checkpoints/LATEST.json"
CONFIG = "config.yaml"  # a folder with this file is a run
# Readers treat these files as proof that everything they name is complete.
LAST = ("result.json", LATEST, CONFIG)
# These say that weights beside them are complete.
MARKERS = ("metrics.json", "copied.json", "chosen.json")
CHECKPOINTS = "checkpoints/checkpoint-"
TRIALS = "trials"  # of a fine-tuning; Ray Tune writes them there, and no run directory has them
SIGN = f"{TRIALS}/driver.json"  # of the driver whose trials write there
CHECKPOINT = "checkpoint_"  # how Ray Tune and Ray Train name the folder of each
# A driver that dies before LATEST.json leaves a checkpoint's name free for other content; a part's
# name is never used again.
NEVER_CHANGE = "episodes/"


class RunMirror:
    """The copy of one run, which one process at a time may write."""

    def __init__(self, uri: str) -> None:
        """Connects to s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or a folder that all machines see.

        Credentials and region come from the environment. A small file is written and removed.

        Raises:
            ConfigError: The URI names no such place, or the place cannot be written to within a
                minute.
        """
        self.uri = uri
        self._filesystem, self._root = open_writable(uri)
        self._copied: dict[str, tuple[int, int]] = {}  # name: size and time of the local file
        self._is_listed = False
        self._thread: threading.Thread | None = None
        self._put_at = 0.0  # when a file last went through
        self._is_taken = False  # whether the storage took the last copy
        self._failure: BaseException | None = None
        self._hold: Hold | None = None
        try:
            self._latest = {self._read(LATEST)}  # contents that this process may find there
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"storage {uri} cannot be read ({one_line(error)}): check its permissions"
            ) from error

    @property
    def folder(self) -> Path | None:
        """The storage as a folder of a disk, which all nodes must see; None for an object store."""
        is_disk = isinstance(self._filesystem, fs.LocalFileSystem)
        return Path(self._root) if is_disk else None

    def trials(self, name: str) -> tuple[str, fs.FileSystem]:
        """Folder in which the trials of a fine-tuning write, and its file system."""
        return f"{self._root}/{TRIALS}/{name}", self._filesystem

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps other drivers from training into this storage; see `check_held`.

        Raises:
            ArtifactError: Another driver trains into it, or it cannot be read or written.
        """
        try:
            hold = Hold(self.uri, partial(self._read, SIGN), partial(self._put, SIGN))
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage {self.uri} cannot be read or written ({one_line(error)}): try again"
            ) from error
        self._hold = hold
        try:
            yield
        finally:
            self._hold = None
            if hold.release():
                with suppress(OSError, pa.ArrowException):
                    self._filesystem.delete_file(self._path(SIGN))

    def check_held(self) -> None:
        """Does nothing as long as no other driver trains into this storage.

        Raises:
            ArtifactError: One does.
        """
        if self._hold is not None:
            self._hold.check()

    def drop_checkpoints(self) -> None:
        """Removes the checkpoints of trials, whose results are in the run; their logs stay."""
        try:
            names = [name.split("/") for name in self._list() if name.startswith(f"{TRIALS}/")]
            folders = {
                "/".join(parts[: place + 1])
                for parts in names
                for place, part in enumerate(parts)
                if part.startswith(CHECKPOINT)
            }
            for folder in sorted(folders):
                self._remove(folder)
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "storage %s: the checkpoints in %s cannot be removed (%s): nothing needs them",
                self.uri,
                TRIALS,
                one_line(error),
            )

    @property
    def config(self) -> dict[str, Any] | None:
        """Content of the mirrored config.yaml; None where the storage holds no run.

        Raises:
            ArtifactError: The file cannot be read.
        """
        try:
            content = self._read(CONFIG)
            if content is None:
                return None
            config = yaml.safe_load(content)
            if not isinstance(config, dict):
                raise ValueError("damaged")
        except (OSError, ValueError, pa.ArrowException, yaml.YAMLError) as error:
            raise ArtifactError(
                f"storage {self.uri}: {CONFIG} cannot be read ({one_line(error)}): try again, or "
                "start with another --storage"
            ) from error
        return config

    def holds(self, name: str) -> bool:
        """Whether a file of the run is there.

        Raises:
            ArtifactError: The storage cannot be read.
        """
        try:
            return self._info(name).type == fs.FileType.File
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage {self.uri} cannot be read ({one_line(error)}): try again"
            ) from error

    def push(self, run_dir: Path) -> None:
        """Starts to copy new files in a thread, so that storage that hangs delays no search.

        Nothing starts while an earlier copy goes on. Where the storage does not take a copy, a
        warning is logged, and the next copy includes the missing files.

        Raises:
            ArtifactError: Another process has copied a run there since this one began, or trains
                into it.
        """
        self.check_held()
        if self._thread is not None and self._thread.is_alive():
            return
        if self._failure is not None:
            raise self._failure
        self._is_taken = False
        try:
            snapshot = _Snapshot(run_dir)  # before the search goes on
        except OSError as error:
            logger.warning(
                "%s cannot be read now (%s); it is copied to %s later",
                run_dir,
                one_line(error),
                self.uri,
            )
            return
        # A daemon thread, because an interrupted driver does not wait and the mirror stays whole.
        self._thread = threading.Thread(target=self._try_copy, args=(snapshot,), daemon=True)
        self._thread.start()

    def finish(self, run_dir: Path) -> None:
        """Copies all new files before it returns; tries for two minutes, ten for each file.

        Raises:
            ArtifactError: The storage did not take the files, and the run directory is whole; or
                another process has copied a run there.
        """
        started = time.monotonic()
        if self._has_ended(started):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                self.push(run_dir)
                if not self._has_ended(started):
                    break
                if self._failure is not None:
                    raise self._failure
                if self._is_taken:
                    return
                if time.monotonic() > deadline:
                    break
                time.sleep(RETRY_SECONDS)
        raise ArtifactError(
            f"storage {self.uri} has not taken the last files; they are in {run_dir}: run the same "
            "command with --resume when it can be written again"
        )

    def pull(self, run_dir: Path) -> None:
        """Fetches the run, unless the folder holds it already.

        Raises:
            ArtifactError: The folder holds an older state than the storage, or reading fails.
        """
        if self.config is None:
            return
        try:
            if (run_dir / CONFIG).exists():
                self._refuse_older(run_dir)
                self._refuse_untrained(run_dir)
                return
            skipped = (CONFIG, f"{TRIALS}/")
            names = [name for name in self._list() if not name.startswith(skipped)]
            for name in (*names, CONFIG):  # the last one makes the folder a run
                content = self._fetch(name)
                write_file(run_dir / name, lambda part, content=content: part.write_bytes(content))
                self._copied[name] = _state(run_dir / name)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage {self.uri} cannot be read ({one_line(error)}): try again"
            ) from error

    def _has_ended(self, started: float) -> bool:
        """Waits for the thread; False where no file went through for too long."""
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(RETRY_SECONDS)
            if time.monotonic() - max(started, self._put_at) > FILE_SECONDS:
                return not self._thread.is_alive()
        return True

    def _try_copy(self, snapshot: "_Snapshot") -> None:
        try:
            self._copy(snapshot)
            self._is_taken = True
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "storage %s cannot be written now (%s); the search goes on and tries again",
                self.uri,
                one_line(error),
            )
        except BaseException as error:  # raised by `push` or `finish`, in their thread
            self._failure = error

    def _copy(self, snapshot: "_Snapshot") -> None:
        latest = self._read(LATEST)
        if latest is None and self._latest != {None}:  # the copy was removed
            self._copied, self._is_listed = {}, False
        elif latest is not None and latest not in self._latest:
            raise ArtifactError(
                f"storage {self.uri}: another process copies a run there; end one of the two; what "
                f"this one has measured is in {snapshot.run_dir}"
            )
        there = {} if self._is_listed else self._list()
        local = snapshot.states
        for name in sorted(local, key=_copy_order):
            is_there = name.startswith(NEVER_CHANGE) and there.get(name) == local[name][0]
            if self._copied.get(name) != local[name] and not is_there:
                content = snapshot.read(name)
                if content is None:
                    continue
                if name == LATEST:  # the storage may keep it although it reports an error
                    self._latest.add(content)
                self._put(name, content)
                self._put_at = time.monotonic()
                if name == LATEST:
                    self._latest = {content}
            self._copied[name] = local[name]
        # Only old checkpoints are removed: other files may belong to somebody else.
        gone = {
            name for name in {*there, *self._copied} - local.keys() if name.startswith(CHECKPOINTS)
        }
        for folder in {"/".join(name.split("/")[:2]) for name in gone}:
            self._remove(folder)
        self._copied = {name: state for name, state in self._copied.items() if name in local}
        self._is_listed = True

    def _refuse_older(self, run_dir: Path) -> None:
        latest = self._read(LATEST)
        if latest is None:
            return
        there = _newest(latest)
        if there is None:
            raise ArtifactError(
                f"storage {self.uri}: {LATEST} is damaged: start with another --storage; {run_dir} "
                "is whole"
            )
        # A damaged local file counts as older than any there, where the checkpoint is whole.
        here = _newest((run_dir / LATEST).read_bytes()) if (run_dir / LATEST).exists() else ""
        if there > (here or ""):
            raise ArtifactError(
                f"{run_dir} is older than {self.uri}, where the run went on: remove the folder or "
                "choose another --run-dir, and it is fetched from there"
            )

    def _refuse_untrained(self, run_dir: Path) -> None:
        """A folder that lacks a fine-tuning which went on elsewhere would be copied over it."""
        for name in self._list():
            is_training = name.startswith("finetune/") or name.endswith("/metrics.json")
            if is_training and not (run_dir / name).exists():
                raise ArtifactError(
                    f"{self.uri} holds a fine-tuning that {run_dir} lacks: remove the folder, and "
                    "it is fetched from there; or, to fine-tune again, delete finetune/, trials/ "
                    "and metrics.json of the subnets there"
                )

    def _read(self, name: str) -> bytes | None:
        """Content of a mirrored file; None where there is none."""
        return self._fetch(name) if self._info(name).type == fs.FileType.File else None

    def _fetch(self, name: str) -> bytes:
        with self._filesystem.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def _put(self, name: str, content: bytes) -> None:
        path = self._path(name)
        if isinstance(self._filesystem, fs.LocalFileSystem):  # it would show half a file
            write_file(Path(path), lambda part: part.write_bytes(content))
            return
        with self._filesystem.open_output_stream(path) as stream:
            stream.write(content)

    def _remove(self, folder: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path(folder))

    def _list(self) -> dict[str, int]:
        """Size of every mirrored file by name."""
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        return {
            str(PurePosixPath(info.path).relative_to(self._root)): info.size
            for info in self._filesystem.get_file_info(selector)
            if info.is_file and not info.base_name.startswith(".")
        }

    def _info(self, name: str) -> Any:
        return self._filesystem.get_file_info(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Snapshot:
    """The files of a run at one moment."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.states: dict[str, tuple[int, int]] = {}  # size and modification time by name
        for path in sorted(run_dir.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # loggers have temporary files
                    self.states[path.relative_to(run_dir).as_posix()] = _state(path)
        # Read now: checkpoints will be dropped, and a later journal would not match the parts.
        self._held = {
            name: (run_dir / name).read_bytes()
            for name in self.states
            if name.startswith("checkpoints/") or name == JOURNAL
        }

    def read(self, name: str) -> bytes | None:
        """Content of a file; None where it has been removed since."""
        if name in self._held:
            return self._held[name]
        try:
            return (self.run_dir / name).read_bytes()
        except FileNotFoundError:
            return None


def _state(file: Path) -> tuple[int, int]:
    """Size and modification time."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _copy_order(name: str) -> tuple[int, str]:
    if name in LAST:
        return len(MARKERS) + 1 + LAST.index(name), name
    last = name.rpartition("/")[2]
    return MARKERS.index(last) + 1 if last in MARKERS else 0, name


def _newest(latest: bytes) -> str | None:
    """Name of the newest checkpoint in the content of a LATEST.json; None where it is damaged."""
    try:
        return max((str(entry["name"]) for entry in parse_json(latest)["checkpoints"]), default="")
    except (ValueError, KeyError, TypeError):
        return None
