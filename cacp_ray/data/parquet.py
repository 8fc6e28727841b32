"""Labelled images in Parquet files, in the Hugging Face layout.

The image column is a struct of `bytes` (and `path`) or plain binary, the label column an integer.
Class names are read from the schema metadata `huggingface` or `class_names`.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.errors import ArtifactError, first_line
from cacp_ray.io.files import parse_json

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
NO_LABEL = np.iinfo(np.int64).min


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files whose rows follow one another."""

    name: str
    filesystem: fs.FileSystem
    files: tuple[str, ...]

    @property
    def resolved(self) -> tuple[str, ...]:
        """(F,) files that hold the rows, with links followed: equal names mean the same file."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return tuple(os.path.realpath(file) for file in self.files)
        return tuple(f"{self.filesystem.type_name}:{file}" for file in self.files)

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._open(self.files[0]).schema_arrow

    @cached_property
    def _columns(self) -> tuple[str, str]:
        return self._find_column(IMAGE_COLUMNS), self._find_column(LABEL_COLUMNS)

    @cached_property
    def starts(self) -> NDArray[np.int64]:
        """(F + 1,) number of rows before each of these files, and of all rows."""
        lengths = [self._footer(file).num_rows for file in self.files]
        return np.concatenate([[0], np.cumsum(lengths)])

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """(N,) in [0, number of classes); NO_LABEL for a row without a label."""
        _, column = self._columns
        parts = []
        for file in self.files:
            with _reading(file):
                labels = self._open(file).read(columns=[column])[column]
            if not pa.types.is_integer(labels.type):
                raise ArtifactError(
                    f"data {file}: labels in column {column} are {labels.type}; they must be "
                    "integers, a class for each image: numbers to predict, or several labels, are "
                    "the business of a task of your own (docs/tasks.md)"
                )
            try:
                parts.append(labels.cast(pa.int64()).fill_null(NO_LABEL).to_numpy())
            except pa.ArrowInvalid as error:
                raise ArtifactError(
                    f"data {file}: a label is larger than 2^63 ({first_line(error)}); mend it"
                ) from error
        return np.concatenate(parts)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; empty where the schema metadata has none."""
        metadata, (_, column) = self._schema.metadata or {}, self._columns
        key = next((key for key in (b"class_names", b"huggingface") if key in metadata), None)
        if key is None:
            return ()
        try:
            names = parse_json(metadata[key])
            if key == b"huggingface":
                try:
                    names = names["info"]["features"][column]["names"]
                except (KeyError, TypeError):
                    return ()  # a label that is no ClassLabel
            if (
                not isinstance(names, list)
                or not names
                or not all(isinstance(name, str) for name in names)
            ):
                raise ValueError("no list of names")
        except ValueError as error:
            raise ArtifactError(
                f"data {self.files[0]}: the class names in the schema's {key.decode()} cannot be "
                f"read ({first_line(error)}); mend them"
            ) from error
        return tuple(names)

    @cached_property
    def blocks(self) -> NDArray[np.int64]:
        """(B,) first row of each block that is read as a whole, rising from 0: of row groups."""
        sizes = [
            group.num_rows
            for metadata in map(self._footer, self.files)
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        ]
        return np.cumsum([0, *sizes])[:-1]

    def read(self, rows: NDArray[np.int64]) -> Iterator[tuple[int, bytes | None]]:
        """Rising rows with their encoded images; None for a row without an image.

        Row groups without any of the rows are not read.
        """
        column, _ = self._columns
        rows = np.sort(rows)
        for number, file in enumerate(self.files):
            first, last = np.searchsorted(rows, self.starts[number : number + 2])
            if first == last:
                continue
            wanted = rows[first:last] - self.starts[number]
            opened = self._open(file)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            starts = np.concatenate([[0], np.cumsum(sizes)])
            for group in range(len(sizes)):
                low, high = np.searchsorted(wanted, starts[group : group + 2])
                if low == high:
                    continue
                with _reading(file):
                    images = opened.read_row_group(group, columns=[column])[column]
                if pa.types.is_struct(images.type):
                    if images.type.get_field_index("bytes") < 0:
                        raise ArtifactError(
                            f"data {file}: column {column} has no field `bytes`; the images "
                            "themselves must be in it, as `cacp-ray data convert` writes them"
                        )
                    parts = [chunk.field("bytes") for chunk in images.chunks]
                    images = pa.chunked_array(parts, parts[0].type)
                chosen = images.take(wanted[low:high] - starts[group])
                for row, value in zip(wanted[low:high].tolist(), chosen, strict=True):
                    yield int(row + self.starts[number]), value.as_py()

    def where(self, row: int) -> str:
        """Name of a row in messages."""
        number = int(np.searchsorted(self.starts, row, side="right")) - 1
        return f"{self.files[number]}, row {row - self.starts[number]}"

    @cached_property
    def _footers(self) -> dict[str, pq.FileMetaData]:
        """Footers of the opened files by name: an object store takes a while for each."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """Leaves out the footers, which are many times larger than the labels."""
        return {name: value for name, value in vars(self).items() if name != "_footers"}

    def _open(self, file: str) -> pq.ParquetFile:
        with _reading(file):
            opened = pq.ParquetFile(
                self.filesystem.open_input_file(file),
                metadata=self._footers.get(file),
                page_checksum_verification=True,  # for pages with checksums, as `convert` writes
            )
        self._footers[file] = opened.metadata
        return opened

    def _footer(self, file: str) -> pq.FileMetaData:
        return self._footers.get(file) or self._open(file).metadata

    def _find_column(self, names: Sequence[str]) -> str:
        known = self._schema.names
        for name in names:
            if known.count(name) > 1:
                raise ArtifactError(f"data {self.name}: two columns are named {name}; drop one")
            if name in known:
                return name
        elsewhere = (
            "; several label columns, or none, are the business of a task of your own "
            "(docs/tasks.md)"
        )
        raise ArtifactError(
            f"data {self.name}: none of the columns {', '.join(names)} among {', '.join(known)}"
            f"{elsewhere if names is LABEL_COLUMNS else ': rename the column of images'}"
        )


@contextmanager
def _reading(file: str) -> Iterator[None]:
    """Turns pyarrow's errors at a broken file into one line."""
    try:
        yield
    except KeyError as error:
        raise ArtifactError(
            f"data {file}: {error.args[0]}; all shards must have the columns of the first, each "
            "once"
        ) from error
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"data {file}: not a readable Parquet file ({first_line(error)}); fetch or convert it "
            "again"
        ) from error
