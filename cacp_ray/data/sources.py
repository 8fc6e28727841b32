"""Where labelled images lie: Parquet files in the Hugging Face layout, or a folder a class.

A path is a Parquet file, a folder or a pattern of Parquet files (shards, in the order of their
names), or a folder with a folder of images for each class, as torchvision's ImageFolder and its
ImageNet have them; also s3://, gs:// and what else pyarrow.fs knows, with credentials from the
environment. Labels are read at once, 8 bytes an image; images only where they are asked for.
"""

import fnmatch
import posixpath
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.data.image_folder import FolderSource
from cacp_ray.data.parquet import ParquetSource
from cacp_ray.errors import ArtifactError, ConfigError, first_line, nearest_names


class Source(Protocol):
    """Labelled images by row."""

    @property
    def name(self) -> str:
        """As errors call it."""
        ...

    @property
    def labels(self) -> NDArray[np.int64]:
        """(N,) each in [0, number of classes); of rows without a label the smallest int64."""
        ...

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty where the source has none."""
        ...

    @property
    def resolved(self) -> tuple[str, ...]:
        """(F,) files that hold the rows, links followed: equal names are the same file."""
        ...

    @property
    def starts(self) -> NDArray[np.int64]:
        """(F + 1,) rows before each of these files, and of all."""
        ...

    @property
    def blocks(self) -> NDArray[np.int64]:
        """(B,) first rows of what is read together, rising from 0."""
        ...

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """Rows, rising, with their encoded images; None where there is none."""
        ...

    def where(self, row: int) -> str:
        """A row as errors call it."""
        ...


def open_source(path: str) -> Source:
    """What lies at a path; see the module.

    Args:
        path: Or `embedded:train|search|test`, the package's CIFAR-10 sample.

    Raises:
        ConfigError: The path cannot be understood.
        ArtifactError: There is nothing, or nothing with images.
    """
    if path.startswith("embedded:"):
        path = str(_find_embedded(path.removeprefix("embedded:")))
    try:
        folder, slash, last = path.rpartition("/")
        is_pattern = any(sign in last for sign in "*?[")
        # The last part is no part of the URI: a question mark in it would begin a query.
        filesystem, where = open_place((folder or slash or ".") if is_pattern else path)
        if is_pattern:
            folder, where = where, posixpath.join(where, last)
        kind = filesystem.get_file_info(where).type
        if kind == fs.FileType.File:
            return ParquetSource(path, filesystem, (where,))
        if is_pattern and kind == fs.FileType.NotFound:
            files = _list_files(filesystem, folder, last)
            if not files:
                raise ArtifactError(f"data {path}: no file fits; give the path of Parquet files")
            return ParquetSource(path, filesystem, files)
        if kind == fs.FileType.NotFound:
            raise ArtifactError(
                f"data {path}: no such file; give Parquet files or a folder of images"
            )
        files = _list_files(filesystem, where, "*.parquet")
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data {path}: cannot be opened ({first_line(error)})") from error
    if files:
        return ParquetSource(path, filesystem, files)
    source = FolderSource(path, filesystem, where)
    if not len(source.labels):
        raise ArtifactError(
            f"data {path}: neither Parquet files nor folders of images; give one of them"
        )
    return source


def open_place(path: str) -> tuple[fs.FileSystem, str]:
    """The file system of a path or URI, and the path there.

    Raises:
        ConfigError: There is no such file system.
    """
    try:
        if "://" in path:
            return fs.FileSystem.from_uri(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data {path}: cannot be opened ({first_line(error)})") from error
    # Absolute, also for processes elsewhere.
    return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def have_common_rows(
    first: Source, rows: NDArray[np.int64], second: Source, others: NDArray[np.int64]
) -> bool:
    """Whether a row of one is a row of the other, however their paths are spelled."""
    if first.name == second.name:
        return len(np.intersect1d(rows, others, assume_unique=True)) > 0
    known = {file: number for number, file in enumerate(first.resolved)}
    numbers = np.array([known.get(file, -1) for file in second.resolved])
    if (numbers < 0).all():
        return False
    mine = _places(first, rows, np.arange(len(known)))
    theirs = _places(second, others, numbers)
    return len(np.intersect1d(mine, theirs[theirs >= 0])) > 0


def _places(
    source: Source, rows: NDArray[np.int64], numbers: NDArray[np.int64]
) -> NDArray[np.int64]:
    """(N,) the number of each row's file and the row in it, as one; negative without number."""
    file = np.searchsorted(source.starts, rows, side="right") - 1
    return (numbers[file] << 40) + rows - source.starts[file]


def _list_files(filesystem: fs.FileSystem, folder: str, pattern: str) -> tuple[str, ...]:
    found = filesystem.get_file_info(fs.FileSelector(folder or ".", allow_not_found=True))
    names = (each.path for each in found if each.type == fs.FileType.File)
    return tuple(
        sorted(name for name in names if fnmatch.fnmatch(posixpath.basename(name), pattern))
    )


def _find_embedded(name: str) -> Path:
    folder = Path(str(resources.files("cacp_ray.data"))) / "cifar10_sample"
    known = {file.stem: file for file in folder.glob("*.parquet")}
    if name not in known:
        raise ConfigError(f"no embedded split {name!r}: {nearest_names(name, known)}")
    return known[name]
