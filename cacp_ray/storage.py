"""A copy of a run on shared or object storage, from which it goes on elsewhere.

The run directory stays on the driver's disk; after every checkpoint, what is new in it is copied.
Object stores cannot rename, so order does what names do on a disk: parts and checkpoints keep their
names for good and go first, `checkpoints/LATEST.json`, which names whole checkpoints with the hash
of every file, goes after them, and only then is what it no longer names removed. Each file is one
put, which an object store shows whole or not at all. A driver killed in between leaves the copy as
it was, or with more measurements than the checkpoint knows, which resuming is made for.
"""
# pyarrow has no complete types:
# pyright: basic

import json
import logging
import os
import threading
import time
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import yaml
from pyarrow import fs

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.file_systems import one_line, open_writable

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 120.0
ASIDE_SECONDS = 600.0  # for a large file on its way
RETRY_SECONDS = 5.0
LATEST = "checkpoints/LATEST.json"
JOURNAL = "journal.jsonl"
FIRST_IS_BEGUN = "config.yaml"  # written first of all, so it goes last of the first copy
# Whoever finds one of these takes what it speaks of for whole: the subnets, the checkpoints, all.
LAST = ("result.json", LATEST, FIRST_IS_BEGUN)
CHECKPOINTS = "checkpoints/checkpoint-"
# A checkpoint's name comes again, with other content, where a driver died before LATEST.json.
NEVER_CHANGE = "episodes/"


class RunStorage:
    """Where one run is copied to."""

    def __init__(self, uri: str) -> None:
        """Connects, and writes and removes a small file.

        Args:
            uri: s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, or a folder that other machines see too.
                Credentials and region come from the environment.

        Raises:
            ConfigError: Not such a place, or it cannot be written to; within a minute.
        """
        self.uri = uri
        self._filesystem, self._root = open_writable(uri)
        self._copied: dict[str, tuple[int, int]] = {}  # name: size and time of the local file
        self._is_listed = False
        self._aside: threading.Thread | None = None
        self._put_at = 0.0  # when a file last went through
        self._is_taken = False  # the last copy beside
        self._failure: BaseException | None = None
        try:
            self._latest = {self._read(LATEST)}  # what this process may find there
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"storage {uri} cannot be read ({one_line(error)}): check its permissions"
            ) from error

    @property
    def config(self) -> dict[str, Any] | None:
        """Content of the run's config.yaml; None where no run was copied there.

        Raises:
            ArtifactError: It cannot be read.
        """
        try:
            content = self._read(FIRST_IS_BEGUN)
            if content is None:
                return None
            config = yaml.safe_load(content)
            if not isinstance(config, dict):
                raise ValueError("damaged")
        except (OSError, ValueError, pa.ArrowException, yaml.YAMLError) as error:
            raise ArtifactError(
                f"storage {self.uri}: {FIRST_IS_BEGUN} cannot be read ({one_line(error)}): try "
                "again, or start with another --storage"
            ) from error
        return config

    @property
    def holds_run(self) -> bool:
        """Whether a run was copied there.

        Raises:
            ArtifactError: It cannot be read.
        """
        return self.config is not None

    def push(self, run_dir: Path) -> None:
        """Begins to copy what is new, in a thread: a place that hangs holds up no search.

        While an earlier copy goes on, nothing is begun. Where the storage does not take a copy,
        there is a warning, and the next one is of all that is missing.

        Raises:
            ArtifactError: Another process has copied a run there since this one began.
        """
        if self._aside is not None and self._aside.is_alive():
            return
        if self._failure is not None:
            raise self._failure
        found = self._look(run_dir)  # now, as the search goes on
        if found is None:
            return

        def copy() -> None:
            try:
                self._is_taken = self._try_push(found)
            except BaseException as error:  # for whoever waits for it, in another thread
                self._failure = error

        # A daemon: a driver that is interrupted does not wait for it, and the copy stays whole.
        self._aside = threading.Thread(target=copy, daemon=True)
        self._aside.start()

    def _look(self, run_dir: Path) -> "_Snapshot | None":
        try:
            return _Snapshot(run_dir)
        except OSError as error:
            logger.warning(
                "%s cannot be read now (%s); it is copied to %s later",
                run_dir,
                one_line(error),
                self.uri,
            )
            return None

    def _try_push(self, found: "_Snapshot") -> bool:
        try:
            self._push(found)
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "storage %s cannot be written now (%s); the search goes on and tries again",
                self.uri,
                one_line(error),
            )
            return False
        return True

    def finish(self, run_dir: Path) -> None:
        """Copies what is new: tried for two minutes, and waited for while files go through.

        A file is given ten minutes.

        Raises:
            ArtifactError: The storage did not take it; the run directory is whole. Or as of `push`.
        """
        started = time.monotonic()
        if self._has_ended(started):
            deadline = time.monotonic() + PATIENCE_SECONDS
            while True:
                self._is_taken = False
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

    def _has_ended(self, started: float) -> bool:
        """Waits for the copy beside; False where no file went through for long."""
        while self._aside is not None and self._aside.is_alive():
            self._aside.join(RETRY_SECONDS)
            if time.monotonic() - max(started, self._put_at) > ASIDE_SECONDS:
                return not self._aside.is_alive()
        return True

    def pull(self, run_dir: Path) -> None:
        """Fetches the run, unless the folder has it.

        Raises:
            ArtifactError: The folder holds an older state than the storage, or reading fails.
        """
        if not self.holds_run:
            return
        try:
            if (run_dir / FIRST_IS_BEGUN).exists():
                self._refuse_older(run_dir)
                return
            names = [name for name in self._list() if name != FIRST_IS_BEGUN]
            for name in (*names, FIRST_IS_BEGUN):  # with the last one, the folder is a run
                file = run_dir / name
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_name(f".{file.name}.tmp")
                with self._filesystem.open_input_stream(self._path(name)) as stream:
                    part.write_bytes(stream.read())
                part.replace(file)
                self._copied[name] = _state(file)
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage {self.uri} cannot be read ({one_line(error)}): try again"
            ) from error

    def _push(self, found: "_Snapshot") -> None:
        latest = self._read(LATEST)
        if latest is None:  # nothing there yet, or no more
            self._copied, self._is_listed = {}, False
        elif latest not in self._latest:
            raise ArtifactError(
                f"storage {self.uri}: another process copies a run there; end one of the two; what "
                f"this one has measured is in {found.run_dir}"
            )
        there = {} if self._is_listed else self._list()
        local = found.states
        for name in sorted(local, key=_turn):
            is_there = name.startswith(NEVER_CHANGE) and there.get(name) == local[name][0]
            if self._copied.get(name) != local[name] and not is_there:
                content = found.read(name)
                if content is None:
                    continue
                if name == LATEST:  # it may arrive although the answer says no
                    self._latest.add(content)
                self._put(name, content)
                self._put_at = time.monotonic()
                if name == LATEST:
                    self._latest = {content}
            self._copied[name] = local[name]
        # Whatever else is there is not ours to remove.
        gone = {
            name for name in {*there, *self._copied} - local.keys() if name.startswith(CHECKPOINTS)
        }
        for folder in {"/".join(name.split("/")[:2]) for name in gone}:
            self._remove(folder)
        self._copied = {name: state for name, state in self._copied.items() if name in local}
        self._is_listed = True

    def _read(self, name: str) -> bytes | None:
        """The content of a file there; None without one."""
        if self._info(name).type != fs.FileType.File:
            return None
        with self._filesystem.open_input_stream(self._path(name)) as stream:
            return stream.read()

    def _put(self, name: str, content: bytes) -> None:
        path = self._path(name)
        if not isinstance(self._filesystem, fs.LocalFileSystem):
            with self._filesystem.open_output_stream(path) as stream:
                stream.write(content)
            return
        # A folder shows a file while it is written, but can rename it.
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.tmp")
        part.write_bytes(content)
        os.replace(part, target)

    def _remove(self, folder: str) -> None:
        with suppress(FileNotFoundError):
            self._filesystem.delete_dir(self._path(folder))

    def _list(self) -> dict[str, int]:
        """Name: size of every file there."""
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = [each for each in self._filesystem.get_file_info(selector) if each.is_file]
        sizes = {str(PurePosixPath(each.path).relative_to(self._root)): each for each in found}
        return {name: each.size for name, each in sizes.items() if each.base_name[0] != "."}

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
        # A damaged one here is older than any there, which still has the checkpoint.
        here = (
            _newest((run_dir / LATEST).read_bytes()) if (run_dir / LATEST).exists() else ""
        ) or ""
        if there > here:
            raise ArtifactError(
                f"{run_dir} is older than {self.uri}, where the run went on: remove the folder or "
                "choose another --run-dir, and it is fetched from there"
            )

    def _info(self, name: str) -> Any:
        return self._filesystem.get_file_info(self._path(name))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _turn(name: str) -> tuple[int, str]:
    """In which order files are copied."""
    return LAST.index(name) + 1 if name in LAST else 0, name


class _Snapshot:
    """The files of a run at one moment.

    Attributes:
        run_dir: The folder.
        states: Size and time of change of each file by name.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.states: dict[str, tuple[int, int]] = {}
        for path in sorted(run_dir.rglob("*")):
            if path.is_file() and not path.name.startswith("."):
                with suppress(FileNotFoundError):  # another process's, as loggers have them
                    self.states[path.relative_to(run_dir).as_posix()] = _state(path)
        # Checkpoints are dropped meanwhile, and a later journal does not go with the parts of now.
        self._held = {
            name: (run_dir / name).read_bytes()
            for name in self.states
            if name.startswith("checkpoints/") or name == JOURNAL
        }

    def read(self, name: str) -> bytes | None:
        """The content; None of a file that is gone since."""
        if name in self._held:
            return self._held[name]
        try:
            return (self.run_dir / name).read_bytes()
        except FileNotFoundError:
            return None


def _state(file: Path) -> tuple[int, int]:
    """Size and time of change."""
    status = file.stat()
    return status.st_size, status.st_mtime_ns


def _newest(latest: bytes) -> str | None:
    """Name of the newest checkpoint in the content of a LATEST.json; None where it is damaged."""
    try:
        return max((str(entry["name"]) for entry in json.loads(latest)["checkpoints"]), default="")
    except (ValueError, KeyError, TypeError):
        return None
