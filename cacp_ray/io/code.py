"""Folders where a user's own code may lie, next to what is installed."""

import os
import sys
from pathlib import Path

VARIABLE = "CACP_RAY_CODE"
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


def code_variable() -> dict[str, str]:
    """The variable by which processes that are started look there too: `extend_path` reads it.

    PYTHONPATH would put the folders before everything that is installed.
    """
    return {VARIABLE: os.pathsep.join(_folders)} if _folders else {}


def extend_path() -> None:
    """Looks where the process that started this one does; importing the package calls it."""
    folders = os.environ.get(VARIABLE, "").split(os.pathsep)
    sys.path += [folder for folder in folders if folder and folder not in sys.path]
