"""Labelled images by path: Parquet files in the Hugging Face layout, or a folder for each class.

A path names a Parquet file, a folder or a pattern of Parquet files (shards in the order of their
names), or a folder that holds a folder of images for each class, as torchvision's ImageFolder does.
It may be a URI that pyarrow.fs knows, such as s3:// or gs://, with credentials from the
environment. Labels are read at once, 8 bytes for each image; images are read when they are needed.
"""

import fnmatch
import posixpath
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.data.image_folder import FolderSource
from cacp_ray.data.parquet import ParquetSource
from cacp_ray.errors import ArtifactError, ConfigError, first_line, nearest_names

Source = ParquetSource | FolderSource  # `ParquetSource` documents what both have


def open_source(path: str) -> Source:
    """Opens a path, or `embedded:train|search|test` for the package's CIFAR-10 sample.

    Raises:
        ConfigError: The path cannot be opened.
        ArtifactError: The path does not exist or holds no images.
    """
    if path.startswith("embedded:"):
        path = str(_find_embedded(path.removeprefix("embedded:")))
    try:
        folder, slash, last = path.rpartition("/")
        is_pattern = any(sign in last for sign in "*?[")
        # The last part is kept out of the URI, where a question mark would begin a query.
        filesystem, where = open_place((folder or slash or ".") if is_pattern else path)
        if is_pattern:
            folder, where = where, posixpath.join(where, last)
        kind = filesystem.get_file_info(where).type
        if kind == fs.FileType.File:
            files = (where,)
        elif is_pattern and kind == fs.FileType.NotFound:
            files = _list_files(filesystem, folder, last)
            if not files:
                raise ArtifactError(f"data {path}: no file fits; give the path of Parquet files")
        elif kind == fs.FileType.NotFound:
            raise ArtifactError(
                f"data {path}: no such file; give Parquet files or a folder of images"
            )
        else:
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
    """File system of a path or URI, and the path in it.

    Raises:
        ConfigError: There is no such file system.
    """
    try:
        if "://" in path:
            return fs.FileSystem.from_uri(path)
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"data {path}: cannot be opened ({first_line(error)})") from error
    # Absolute, because other processes have other working directories.
    return fs.LocalFileSystem(), str(Path(path).expanduser().absolute())


def have_common_rows(
    first: Source, rows: NDArray[np.int64], second: Source, others: NDArray[np.int64]
) -> bool:
    """Whether distinct `rows` of one source and `others` of the second are partly the same.

    Paths may be spelled differently.
    """
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
    """(N,) file number and row within the file as one integer; negative for an unknown file."""
    file = np.searchsorted(source.starts, rows, side="right") - 1
    return (numbers[file] << 40) + rows - source.starts[file]


def _list_files(filesystem: fs.FileSystem, folder: str, pattern: str) -> tuple[str, ...]:
    entries = filesystem.get_file_info(fs.FileSelector(folder or ".", allow_not_found=True))
    names = (entry.path for entry in entries if entry.type == fs.FileType.File)
    return tuple(sorted(n for n in names if fnmatch.fnmatch(posixpath.basename(n), pattern)))


def _find_embedded(name: str) -> Path:
    folder = Path(str(resources.files("cacp_ray.data"))) / "cifar10_sample"
    known = {file.stem: file for file in folder.glob("*.parquet")}
    if name not in known:
        raise ConfigError(f"no embedded split {name!r}: {nearest_names(name, known)}")
    return known[name]
