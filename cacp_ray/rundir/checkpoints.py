"""Checkpoints of a search, of which the last two are kept.

A checkpoint is a folder that is renamed into place and then named in `LATEST.json` with the size
and hash of every file.
"""

import hashlib
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import parse_json, write_json
from cacp_ray.io.schema import find_problem, version_of
from cacp_ray.rundir.schema import LatestFile

logger = logging.getLogger(__name__)

SCHEMA_VERSION = 2


def save_checkpoint(folder: Path, told: int, write: Callable[[Path], object]) -> None:
    """Saves a checkpoint that `write` fills, and drops all others but the last whole one.

    `told` is the number of measurements that the strategy had been told.
    """
    before = _read_latest(folder)
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
    whole = [entry for entry in before if _is_whole(folder, entry)]
    entries: list[dict[str, Any]] = [{"name": name, "told": told, "files": files}, *whole[:1]]
    latest = {"schema_version": SCHEMA_VERSION, "checkpoints": entries}
    write_json(folder / "LATEST.json", latest)
    named = {entry["name"] for entry in entries}
    for old in folder.iterdir():
        if old.is_dir() and old.name not in named:
            shutil.rmtree(old)


def find_checkpoint(folder: Path) -> tuple[Path, int] | None:
    """Folder of the newest whole checkpoint, and how many records had been told; else None.

    Raises:
        ArtifactError: Another version of cacp_ray wrote the checkpoints, or they cannot be read.
    """
    try:
        entries = _read_latest(folder)
    except OSError as error:
        raise ArtifactError(f"{folder}: cannot be read now ({error}); try again") from error
    for entry in entries:
        if _is_whole(folder, entry):
            return folder / entry["name"], entry["told"]
        logger.warning("%s: %s is damaged, going further back", folder, entry["name"])
    return None


def _read_latest(folder: Path) -> list[dict[str, Any]]:
    file = folder / "LATEST.json"
    if not file.exists():
        return []
    content = file.read_bytes()  # a failing disk raises: that is not damage
    try:
        latest: Any = parse_json(content)
    except ValueError:
        latest = None
    version = version_of(latest, SCHEMA_VERSION)
    if isinstance(version, int) and version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file}: schema version {version}, this cacp_ray reads {SCHEMA_VERSION}; go on "
            "with the cacp_ray that wrote it"
        )
    if problem := find_problem(latest, LatestFile):
        logger.warning(
            "%s is damaged (%s): the search restarts from its measurements", file, problem
        )
        return []
    return latest["checkpoints"]


def _is_whole(folder: Path, entry: dict[str, Any]) -> bool:
    checkpoint = folder / entry["name"]
    return all(
        (checkpoint / name).is_file()
        and (checkpoint / name).stat().st_size == expected["size"]
        and _sha256(checkpoint / name) == expected["sha256"]
        for name, expected in entry["files"].items()
    )


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
