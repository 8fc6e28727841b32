"""Labelled images as files, in a folder for each class."""

import os
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.errors import ArtifactError, first_line

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


@dataclass(frozen=True)
class FolderSource:
    """A folder of images for each class; classes and images in the order of their names.

    A class folder without images is a class too, so that a part of a data set keeps its labels.
    """

    name: str
    filesystem: fs.FileSystem
    root: str

    @cached_property
    def _found(self) -> list[fs.FileInfo]:
        try:
            found = self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))
            return [each for each in found if not _is_hidden(self._inside(each.path))]
        except (OSError, pa.ArrowException, UnicodeError) as error:
            raise ArtifactError(
                f"data {self.name}: a file or folder cannot be listed ({first_line(error)}); "
                "rename or mend it"
            ) from error

    @cached_property
    def files(self) -> list[fs.FileInfo]:
        """The images, by row."""
        found = sorted(self._found, key=lambda each: each.path)
        return [
            each
            for each in found
            if each.type == fs.FileType.File
            and each.path.lower().endswith(IMAGE_SUFFIXES)
            and posixpath.dirname(self._inside(each.path))
        ]

    @property
    def resolved(self) -> tuple[str, ...]:
        """See `Source`; the root alone is resolved, or a million images would take a minute."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            root = os.path.realpath(self.root)
        else:
            root = f"{self.filesystem.type_name}:{self.root}"
        return tuple(posixpath.join(root, self._inside(file.path)) for file in self.files)

    @property
    def starts(self) -> NDArray[np.int64]:
        """See `Source`."""
        return np.arange(len(self.files) + 1)

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        folders = {
            name
            for each in self._found
            if each.type == fs.FileType.Directory and "/" not in (name := self._inside(each.path))
        }
        return tuple(sorted(folders | {self._class(file.path) for file in self.files}))

    @property
    def labels(self) -> NDArray[np.int64]:
        """See `Source`."""
        return self._labels

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        numbers = {name: number for number, name in enumerate(self.classes)}
        return np.array([numbers[self._class(file.path)] for file in self.files], dtype=np.int64)

    @property
    def blocks(self) -> NDArray[np.int64]:
        """See `Source`; every image is a file of its own."""
        return np.arange(len(self.files))

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """See `Source`."""
        for row in np.sort(rows).tolist():
            yield row, self._read(self.files[row].path)

    def _read(self, path: str) -> bytes:
        try:
            with self.filesystem.open_input_file(path) as file:
                return file.read()
        except (OSError, pa.ArrowException) as error:
            raise ArtifactError(
                f"data {path}: cannot be read ({first_line(error)}); mend or remove it"
            ) from error

    def where(self, row: int) -> str:
        """See `Source`."""
        return self.files[row].path

    def _inside(self, file: str) -> str:
        return posixpath.relpath(file, self.root)

    def _class(self, file: str) -> str:
        return self._inside(file).split("/")[0]


def _is_hidden(inside: str) -> bool:
    """Also what archives bring along, such as __MACOSX."""
    return inside.startswith("__") or any(part.startswith(".") for part in inside.split("/"))
