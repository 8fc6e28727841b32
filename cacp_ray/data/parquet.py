"""Labelled images in Parquet files, in the Hugging Face layout."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pyarrow import fs

from cacp_ray.errors import ArtifactError, first_line

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")
NO_LABEL = np.iinfo(np.int64).min


@dataclass(frozen=True)
class ParquetSource:
    """Parquet files one after another."""

    name: str
    filesystem: fs.FileSystem
    files: tuple[str, ...]

    @property
    def resolved(self) -> tuple[str, ...]:
        """See `Source`."""
        if isinstance(self.filesystem, fs.LocalFileSystem):
            return tuple(os.path.realpath(file) for file in self.files)
        return tuple(f"{self.filesystem.type_name}:{file}" for file in self.files)

    @cached_property
    def _schema(self) -> pa.Schema:
        return self._open(self.files[0]).schema_arrow

    @cached_property
    def _columns(self) -> tuple[str, str]:
        return (
            self._find_column(IMAGE_COLUMNS),
            self._find_column(LABEL_COLUMNS),
        )

    @property
    def starts(self) -> NDArray[np.int64]:
        """See `Source`."""
        return self._starts

    @cached_property
    def _starts(self) -> NDArray[np.int64]:
        lengths = [self._footer(file).num_rows for file in self.files]
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
            for metadata in map(self._footer, self.files)
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
                    if images.type.get_field_index("bytes") < 0:
                        raise ArtifactError(
                            f"data {file}: column {column} has no field `bytes`; the images "
                            "themselves must be in it, as `cacp-ray data convert` writes them"
                        )
                    parts = [chunk.field("bytes") for chunk in images.chunks]
                    images = pa.chunked_array(parts, parts[0].type)
                chosen = images.take(wanted[low:high] - starts[group])
                for row, value in zip(wanted[low:high].tolist(), chosen, strict=True):
                    yield int(row + self._starts[number]), value.as_py()

    def where(self, row: int) -> str:
        """See `Source`."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        return f"{self.files[number]}, row {row - self._starts[number]}"

    @cached_property
    def _footers(self) -> dict[str, pq.FileMetaData]:
        """Of the files that were opened: an object store takes a while for each."""
        return {}

    def __getstate__(self) -> dict[str, Any]:
        """All but the footers, which are many times larger than the labels."""
        return {name: value for name, value in vars(self).items() if name != "_footers"}

    def _open(self, file: str) -> pq.ParquetFile:
        with self._errors(file):
            opened = pq.ParquetFile(
                self.filesystem.open_input_file(file),
                metadata=self._footers.get(file),
                page_checksum_verification=True,  # where pages have some, as converted ones do
            )
        self._footers[file] = opened.metadata
        return opened

    def _footer(self, file: str) -> pq.FileMetaData:
        return self._footers.get(file) or self._open(file).metadata

    def _errors(self, file: str) -> "_Readable":
        return _Readable(file)

    def _find_column(self, names: Sequence[str]) -> str:
        known = self._schema.names
        for name in names:
            if known.count(name) > 1:
                raise ArtifactError(f"data {self.name}: two columns are named {name}; drop one")
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
        if isinstance(error, KeyError):
            raise ArtifactError(
                f"data {self._file}: {error.args[0]}; all shards must have the columns of the "
                "first, each once"
            ) from error
        if isinstance(error, pa.ArrowException | OSError):
            raise ArtifactError(
                f"data {self._file}: not a readable Parquet file ({first_line(error)}); fetch or "
                "convert it again"
            ) from error


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
