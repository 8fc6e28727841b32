"""Folders on shared disks and object stores, opened for writing."""

import threading
from pathlib import Path

from pyarrow import fs

from cacp_ray.errors import ConfigError, one_line

SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "hdfs", "file")  # of pyarrow.fs
CONNECT_SECONDS = 40.0
GOOGLE_PATIENCE = "retry_limit_seconds=30"  # its client would try for a quarter of an hour


def open_writable(uri: str) -> tuple[fs.FileSystem, str]:
    """File system of a path or URI, and the folder in it, where a small file could be written.

    Raises:
        ConfigError: The URI names no such place, or the place cannot be written to within a minute.
    """
    scheme = uri.partition("://")[0] if "://" in uri else ""
    looks_like_uri = any(uri.startswith(f"{known}:") for known in SCHEMES)
    if not uri or ((scheme or looks_like_uri) and scheme not in SCHEMES):
        raise ConfigError(
            f"storage {uri!r}: write s3://BUCKET/FOLDER, gs://BUCKET/FOLDER, "
            "abfs://CONTAINER@ACCOUNT.dfs.core.windows.net/FOLDER or a folder"
        )
    outcomes: list[tuple[fs.FileSystem, str] | Exception] = []

    def connect() -> None:
        try:
            outcomes.append(_open(uri, scheme))
        except Exception as error:  # pyarrow raises many kinds here
            outcomes.append(error)

    # In a thread: Google's client waits a quarter of an hour for credentials that never come.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(CONNECT_SECONDS)
    outcome = outcomes[0] if outcomes else TimeoutError(f"no answer in {CONNECT_SECONDS:.0f} s")
    if isinstance(outcome, Exception):
        raise ConfigError(
            f"storage {uri} cannot be written to ({one_line(outcome)}): check the name, the "
            "network and the credentials in the environment"
        ) from outcome
    return outcome


def _open(uri: str, scheme: str) -> tuple[fs.FileSystem, str]:
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
    return filesystem, root


def overlaps(uri: str, folder: Path) -> bool:
    """Whether a storage is this local folder, lies in it, or contains it."""
    path = uri.removeprefix("file://")
    if "://" in path:
        return False
    there, here = Path(path).resolve(), folder.resolve()
    return there.is_relative_to(here) or here.is_relative_to(there)
