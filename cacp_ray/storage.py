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

logger = logging.getLogger(__name__)

SCHEMES = ("s3", "gs", "gcs", "file")
CONNECT_SECONDS = 40.0
PATIENCE_SECONDS = 120.0
RETRY_SECONDS = 5.0
GOOGLE_PATIENCE = "retry_limit_seconds=30"  # its client would try for a quarter of an hour
LATEST = "checkpoints/LATEST.json"
FIRST_IS_BEGUN = "config.yaml"  # written first of all, so it goes last of the first copy
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
        self._filesystem, self._root = _connect(uri)
        self._copied: dict[str, tuple[int, int]] = {}  # name: size and time of the local file
        self._is_listed = False
        try:
            self._latest = {self._read(LATEST)}  # what this process may find there
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"storage {uri} cannot be read ({_one_line(error)}): check its permissions"
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
                f"storage {self.uri}: {FIRST_IS_BEGUN} cannot be read ({_one_line(error)}): try "
                "again, or start with another --storage"
            ) from error
        return config

    @property
    def holds_run(self) -> bool:
        """Whether a run was copied there."""
        return self._info(FIRST_IS_BEGUN).type == fs.FileType.File

    def push(self, run_dir: Path) -> bool:
        """Copies what is new; False and a warning where the storage does not take it now.

        Raises:
            ArtifactError: Another process has copied a run there since this one began.
        """
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
            ArtifactError: The storage did not take it; the run directory is whole. Or as of `push`.
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
        latest = self._read(LATEST)
        if latest is None:  # nothing there yet, or no more
            self._copied, self._is_listed = {}, False
        elif latest not in self._latest:
            raise ArtifactError(
                f"storage {self.uri}: another process copies a run there; end one of the two; what "
                f"this one has measured is in {run_dir}"
            )
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
                content = local[name].read_bytes()
                if name == LATEST:  # it may arrive although the answer says no
                    self._latest.add(content)
                self._put(name, content)
                if name == LATEST:
                    self._latest = {content}
            self._copied[name] = state
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


def is_within(uri: str, folder: Path) -> bool:
    """Whether a storage is that folder of this machine, or in it."""
    path = uri.removeprefix("file://")
    return "://" not in path and Path(path).resolve().is_relative_to(folder.resolve())


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
                is_google = scheme in ("gs", "gcs") and "retry_limit_seconds" not in uri
                patience = ("&" if "?" in uri else "?") + GOOGLE_PATIENCE if is_google else ""
                filesystem, root = fs.FileSystem.from_uri(uri + patience)
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
