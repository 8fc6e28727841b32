"""Folders where a user's own code may lie, next to what is installed."""

import os
import sys
from pathlib import Path

_folders: list[str] = []


def add_code_folder(folder: Path) -> None:
    """Has Python look in a folder too, after everything else, and processes of a local Ray as well.

    Only names that the user wrote may lead there: `check_origin` keeps those of result files out.
    """
    path = os.path.abspath(folder)
    if path not in _folders:
        _folders.append(path)
    if path not in sys.path:
        sys.path.append(path)


def code_folders() -> list[Path]:
    """The folders that were added."""
    return [Path(folder) for folder in _folders]


def python_path() -> dict[str, str]:
    """PYTHONPATH with these folders at its end, for processes that are started."""
    paths = [os.environ.get("PYTHONPATH", ""), *_folders]
    return {"PYTHONPATH": os.pathsep.join(path for path in paths if path)} if _folders else {}
