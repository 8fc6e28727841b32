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
from pyarrow import fs

from cacp_ray.errors import ArtifactError, ConfigError

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "gcs", "file")
CONNECT_SECONDS = 40.0
PATIENCE_SECONDS = 120.0
RETRY_SECONDS = 5.0
LATEST = "checkpoints/LATEST.json"
FIRST_IS_BEGUN = "config.yaml"  # written first of all, so it goes last of the first copy
CHECKPOINTS = "checkpoints/checkpoint-"
NEVER_CHANGE = ("episodes/", CHECKPOINTS)


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
        self._filesystem, self._root = _connect(uri)
        self._copied: dict[str, tuple[int, int]] = {}  # name: size and time of the local file
        self._is_listed = False

    @property
    def holds_run(self) -> bool:
        """Whether a run was copied there."""
        return self._info(FIRST_IS_BEGUN).type == fs.FileType.File

    def push(self, run_dir: Path) -> bool:
        """Copies what is new; False and a warning where the storage does not take it now."""
        try:
            self._push(run_dir)
        except (OSError, pa.ArrowException) as error:
            logger.warning(
                "storage %s cannot be written now (%s); the search goes on and tries again",
                self.uri,
                _one_line(error),
            )
            return False
        return True

    def finish(self, run_dir: Path) -> None:
        """Copies what is new, trying for two minutes.

        Raises:
            ArtifactError: The storage did not take it; the run directory is whole.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.push(run_dir):
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"storage {self.uri} has not taken the last files; they are in {run_dir}: run "
                    "the same command with --resume when it can be written again"
                )
            time.sleep(RETRY_SECONDS)

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
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage {self.uri} cannot be read ({_one_line(error)}): try again"
            ) from error

    def _push(self, run_dir: Path) -> None:
        there = {} if self._is_listed else self._list()
        local = {
            path.relative_to(run_dir).as_posix(): path
            for path in sorted(run_dir.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        for name in sorted(local, key=lambda name: (name == FIRST_IS_BEGUN, name == LATEST, name)):
            status = local[name].stat()
            state = status.st_size, status.st_mtime_ns
            is_there = name.startswith(NEVER_CHANGE) and there.get(name) == status.st_size
            if self._copied.get(name) != state and not is_there:
                self._put(name, local[name].read_bytes())
            self._copied[name] = state
        self._is_listed = True
        # Whatever else is there is not ours to remove.
        gone = {
            name for name in {*there, *self._copied} - local.keys() if name.startswith(CHECKPOINTS)
        }
        self._copied = {name: state for name, state in self._copied.items() if name in local}
        for folder in {"/".join(name.split("/")[:2]) for name in gone}:
            with suppress(FileNotFoundError):
                self._filesystem.delete_dir(self._path(folder))

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

    def _list(self) -> dict[str, int]:
        """Name: size of every file there."""
        selector = fs.FileSelector(self._root, recursive=True, allow_not_found=True)
        found = [each for each in self._filesystem.get_file_info(selector) if each.is_file]
        sizes = {str(PurePosixPath(each.path).relative_to(self._root)): each for each in found}
        return {name: each.size for name, each in sizes.items() if each.base_name[0] != "."}

    def _refuse_older(self, run_dir: Path) -> None:
        if self._info(LATEST).type != fs.FileType.File:
            return
        with self._filesystem.open_input_stream(self._path(LATEST)) as stream:
            there = _newest(stream.read())
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


def _connect(uri: str) -> tuple[Any, str]:
    """The file system and the folder in it, tried out."""
    scheme = uri.partition("://")[0] if "://" in uri else ""
    looks_like_uri = any(uri.startswith(f"{each}:") for each in SCHEMES)
    if not uri or ((scheme or looks_like_uri) and scheme not in SCHEMES):
        raise ConfigError(
            f"storage {uri!r}: write s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or a folder"
        )
    found: list[Any] = []

    def connect() -> None:
        try:
            if scheme:
                filesystem, root = fs.FileSystem.from_uri(uri)
            else:
                filesystem, root = fs.LocalFileSystem(), str(Path(uri).absolute())
            if isinstance(filesystem, fs.LocalFileSystem):
                filesystem.create_dir(root, recursive=True)
            root = root.rstrip("/")
            with filesystem.open_output_stream(f"{root}/.writable") as stream:
                stream.write(b"x")
            filesystem.delete_file(f"{root}/.writable")
            found.append((filesystem, root))
        except Exception as error:  # pyarrow raises many kinds here
            found.append(error)

    # In a thread: Google's client waits a quarter of an hour for credentials that never come.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    outcome = found[0] if found else TimeoutError(f"no answer in {CONNECT_SECONDS:.0f} s")
    if isinstance(outcome, Exception):
        raise ConfigError(
            f"storage {uri} cannot be written to ({_one_line(outcome)}): check the name, the "
            "network and the credentials in the environment"
        ) from outcome
    return outcome


def _newest(latest: bytes) -> str | None:
    """Name of the newest checkpoint in the content of a LATEST.json; None where it is damaged."""
    try:
        return max((str(entry["name"]) for entry in json.loads(latest)["checkpoints"]), default="")
    except (ValueError, KeyError, TypeError):
        return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
