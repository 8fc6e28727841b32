"""Labelled images as files, one folder for each class."""

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.errors import ArtifactError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """A folder of images for each class, with classes and images in the order of their names.

    A class folder without images counts, so that a part of a data set keeps its labels.
    """

    name: str
    filesystem: fs.FileSystem
    root: str

    @cached_property
    def _entries(self) -> list[fs.FileInfo]:
        try:
            entries = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
            return [entry for entry in entries if not _is_hidden(self._inside(entry.path))]
        except (OSError, pa.ArrowException, UnicodeError) as error:
            raise ArtifactError(
                f"data {self.name}: a file or folder cannot be listed ({first_line(error)}); "
                "rename or mend it"
            ) from error

    @cached_property
    def files(self) -> list[fs.FileInfo]:
        """Image files by row."""
        return [
            entry
            for entry in sorted(self._entries, key=lambda entry: entry.path)
            if entry.type == fs.FileType.File
            and entry.path.lower().endswith(IMAGE_SUFFIXES)
            and posixpath.dirname(self._inside(entry.path))
        ]

    @property
    def resolved(self) -> tuple[str, ...]:
        """See `ParquetSource`. Only the root is resolved: a million images would take a minute."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            root = os.path.realpath(self.root)
        else:
            root = f"{self.filesystem.type_name}:{self.root}"
        return tuple(posixpath.join(root, self._inside(file.path)) for file in self.files)

    @property
    def starts(self) -> NDArray[np.int64]:
        """See `ParquetSource`."""
        return np.arange(len(self.files) + 1)

    @cached_property
    def classes(self) -> tuple[str, ...]:
        """Names of the folders."""
        folders = {
            name
            for entry in self._entries
            if entry.type == fs.FileType.Directory and "/" not in (name := self._inside(entry.path))
        }
        return tuple(sorted(folders | {self._class(file.path) for file in self.files}))

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """See `ParquetSource`."""
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[self._class(file.path)] for file in self.files], dtype=np.int64)

    @property
    def blocks(self) -> NDArray[np.int64]:
        """See `ParquetSource`. Every image is a file of its own."""
        return np.arange(len(self.files))

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """See `ParquetSource`."""
        for row in np.sort(rows).tolist():
            path = self.files[row].path
            try:
                with self.filesystem.open_input_file(path) as file:
                    content = file.read()
            except (OSError, pa.ArrowException) as error:
                raise ArtifactError(
                    f"data {path}: cannot be read ({first_line(error)}); mend or remove it"
                ) from error
            yield row, content

    def where(self, row: int) -> str:
        """See `ParquetSource`."""
        return self.files[row].path

    def __getstate__(self) -> dict[str, Any]:
        """Keeps the paths of the files, because pyarrow's entries cannot be sent elsewhere."""
        kept = {name: value for name, value in vars(self).items() if name != "_entries"}
        return kept | {"files": [file.path for file in self.files]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rows stay those of the first listing, which is not repeated."""
        files = [fs.FileInfo(path, fs.FileType.File) for path in state["files"]]
        vars(self).update(state | {"files": files})

    def _inside(self, file: str) -> str:
        return posixpath.relpath(file, self.root)

    def _class(self, file: str) -> str:
        return self._inside(file).split("/")[0]


def _is_hidden(inside: str) -> bool:
    """Whether a path is hidden, or left over from an archive, such as __MACOSX."""
    return inside.startswith("__") or any(part.startswith(".") for part in inside.split("/"))
