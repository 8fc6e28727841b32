"""Where labelled images lie: Parquet files in the Hugging Face layout, or a folder a class.

A path is a Parquet file, a folder or a pattern of Parquet files (shards, in the order of their
names), or a folder with a folder of images for each class, as torchvision's ImageFolder and its
ImageNet have them; also s3://, gs:// and what else pyarrow.fs knows, with credentials from the
environment. Labels are read at once, 8 bytes an image; images only where they are asked for.
"""

import fnmatch
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.errors import ArtifactError, ConfigError, nearest_names

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".webp")


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
    def blocks(self) -> NDArray[np.int64]:
        """(B,) first rows of what is read together, rising from 0."""
        ...

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """Rows, rising, with their encoded images; None where there is none."""
        ...

    def where(self, row: int) -> str:
        """A row as errors call it."""
        ...


NO_LABEL = np.iinfo(np.int64).min


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files one after another."""

    name: str
    filesystem: fs.FileSystem
    files: tuple[str, ...]

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._open(self.files[0]).schema_arrow

    @cached_property
    def _columns(self) -> tuple[str, str]:
        return (
            self._find_column(IMAGE_COLUMNS),
            self._find_column(LABEL_COLUMNS),
        )

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        """(F + 1,) rows before each file, and of all."""
        lengths = [self._open(file).metadata.num_rows for file in self.files]
        return np.concatenate([[0], np.cumsum(lengths)])

    @property
    def labels(self) -> NDArray[np.int64]:
        """See `Source`."""
        return self._labels

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        _, column = self._columns
        found = []
        for file in self.files:
            with self._errors(file):
                labels = self._open(file).read(columns=[column])[column]
            if not pa.types.is_integer(labels.type):
                raise ArtifactError(
                    f"data {self.name}: labels are {labels.type}; they must be integers"
                )
            found.append(labels.cast(pa.int64()).fill_null(NO_LABEL).to_numpy())
        return np.concatenate(found)

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        return read_class_names(self._schema, self._columns[1])

    @property
    def blocks(self) -> NDArray[np.int64]:
        """See `Source`; the row groups of all files."""
        return self._blocks

    @cached_property
    def _blocks(self) -> NDArray[np.int64]:
        sizes = [
            group.num_rows
            for metadata in (self._open(file).metadata for file in self.files)
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        ]
        return np.cumsum([0, *sizes])[:-1]

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """See `Source`; only the row groups that hold one of the rows are read."""
        column, _ = self._columns
        rows = np.sort(rows)
        for number, file in enumerate(self.files):
            first, last = np.searchsorted(rows, self._starts[number : number + 2])
            if first == last:
                continue
            wanted = rows[first:last] - self._starts[number]
            opened = self._open(file)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            for group in range(len(sizes)):
                low, high = np.searchsorted(wanted, starts[group : group + 2])
                if low == high:
                    continue
                with self._errors(file):
                    images = opened.read_row_group(group, columns=[column])[column]
                if pa.types.is_struct(images.type):
                    parts = [chunk.field("bytes") for chunk in images.chunks]
                    images = pa.chunked_array(parts, pa.binary())
                chosen = images.take(wanted[low:high] - starts[group])
                for row, value in zip(wanted[low:high].tolist(), chosen, strict=True):
                    yield int(row + self._starts[number]), value.as_py()

    def where(self, row: int) -> str:
        """See `Source`."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.files[number]}, row {row - self._starts[number]}"

    def _open(self, file: str) -> pq.ParquetFile:
        with self._errors(file):
            return pq.ParquetFile(self.filesystem.open_input_file(file))

    def _errors(self, file: str) -> "_Readable":
        return _Readable(file)

    def _find_column(self, names: Sequence[str]) -> str:
        known = self._schema.names
        for name in names:
            if name in known:
                return name
        raise ArtifactError(
            f"data {self.name}: none of the columns {', '.join(names)} among {', '.join(known)}"
        )


class _Readable:
    """Turns what pyarrow raises at a broken file into one line."""

    def __init__(self, file: str) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, pa.ArrowException | OSError):
            raise ArtifactError(
                f"data {self._file}: not a readable Parquet file ({first_line(error)}); fetch or "
                "convert it again"
            ) from error


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
        return self.filesystem.get_file_info(fs.FileSelector(self.root, recursive=True))

    @cached_property
    def files(self) -> list[fs.FileInfo]:
        """The images, by row."""
        found = sorted(self._found, key=lambda each: each.path)
        files = [each for each in found if each.path.lower().endswith(IMAGE_SUFFIXES)]
        return [each for each in files if posixpath.dirname(self._inside(each.path))]

    @property
    def classes(self) -> tuple[str, ...]:
        """See `Source`."""
        return self._classes

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        folders = {
            name
            for each in self._found
            if each.type == fs.FileType.Directory
            and not (name := self._inside(each.path)).startswith((".", "__"))
            and "/" not in name
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
            with self.filesystem.open_input_file(self.files[row].path) as file:
                yield row, file.read()

    def where(self, row: int) -> str:
        """See `Source`."""
        return self.files[row].path

    def _inside(self, file: str) -> str:
        return posixpath.relpath(file, self.root)

    def _class(self, file: str) -> str:
        return self._inside(file).split("/")[0]


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
    filesystem, where = open_place(path)
    try:
        folder, pattern = posixpath.split(where)
        if any(sign in pattern for sign in "*?["):
            files = _list_files(filesystem, folder, pattern)
            if not files:
                raise ArtifactError(f"data {path}: no file fits; give the path of Parquet files")
            return ParquetSource(path, filesystem, files)
        kind = filesystem.get_file_info(where).type
        if kind == fs.FileType.File:
            return ParquetSource(path, filesystem, (where,))
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
    return fs.LocalFileSystem(), str(Path(path).absolute())  # also for processes elsewhere


def first_line(error: BaseException | None) -> str:
    """What pyarrow says of an error, without its details."""
    return (str(error).splitlines() or [type(error).__name__])[0]


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


def read_class_names(schema: pa.Schema, label_column: str) -> tuple[str, ...]:
    """Class names from the schema metadata, () where it has none."""
    metadata = schema.metadata or {}
    try:
        if b"class_names" in metadata:
            return tuple(json.loads(metadata[b"class_names"]))
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return tuple(features[label_column]["names"])
    except (KeyError, ValueError, TypeError):
        return ()
