"""Labelled images from Parquet in the Hugging Face layout, decoded to uint8 arrays.

The image column is a struct of `bytes` (and `path`) or plain binary, the label column an integer.
Class names are read from the schema metadata `huggingface` or `class_names`.
"""

import dataclasses
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cacp_ray.data import cifar10
from cacp_ray.data.transforms import from_shared, to_normalized
from cacp_ray.errors import ArtifactError, ConfigError, nearest_names

IMAGE_COLUMNS = ("image", "img", "jpg", "png")
LABEL_COLUMNS = ("label", "labels", "fine_label", "cls")


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one split, in file order.

    Attributes:
        images: uint8 (N, H, W, 3).
        labels: int64 (N,), each in [0, num_classes).
        classes: Class names.
        mean: Of the channels of images in [0, 1], taken off before the network sees them.
        std: Of the channels, divided by.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = cifar10.MEAN
    std: tuple[float, ...] = cifar10.STD

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int | None) -> "ImageSet":
        """The first `count` images; all of them when there are fewer, or for None."""
        return self.slice(0, count)

    def slice(self, start: int, stop: int | None) -> "ImageSet":
        """Images [start, stop), without a copy."""
        rows = slice(start, stop)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])

    def at(self, rows: NDArray[np.int64]) -> "ImageSet":
        """A copy of the images at `rows` (M,)."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Normalised images float32 (N, C, H, W), channels_last, and labels (N,)."""
        return to_normalized(self.images, self.mean, self.std), from_shared(self.labels)


def resolve_path(path: str) -> Path:
    """A data file on disk; `embedded:train|search|test` names the package's CIFAR-10 sample."""
    if path.startswith("embedded:"):
        folder = Path(str(resources.files("cacp_ray.data"))) / "cifar10_sample"
        known = {file.stem: file for file in folder.glob("*.parquet")}
        name = path.removeprefix("embedded:")
        if name not in known:
            raise ConfigError(f"no embedded split {name!r}: {nearest_names(name, known)}")
        return known[name]
    return Path(path)


def read_parquet(
    path: str, rows: tuple[int, int] | None = None, count: int | None = None
) -> ImageSet:
    """Reads and decodes rows of a Parquet file.

    Args:
        path: The file, or an embedded split.
        rows: [start, stop); all rows by default.
        count: Decode only so many of these rows, evenly spaced.

    Raises:
        ArtifactError: The file is missing or corrupt, has no image or label column, holds an image
            that cannot be decoded, images of several sizes, or a label outside the classes.
    """
    file, chosen, labels, classes = read_labels(path, rows, count)
    table = pq.read_table(file)
    images = _decode(
        table[_find_column(table.schema, IMAGE_COLUMNS, file)].take(chosen), file, chosen
    )
    return ImageSet(images, labels, classes)


def read_labels(
    path: str, rows: tuple[int, int] | None = None, count: int | None = None
) -> tuple[Path, NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """All but the images: the file, the row numbers (N,), the labels (N,) and the class names.

    Args and errors are those of `read_parquet`.
    """
    file = resolve_path(path)
    if not file.is_file():
        raise ArtifactError(f"data {file}: no such file; give the path of a Parquet file")
    try:
        schema = pq.read_schema(file)
        _find_column(schema, IMAGE_COLUMNS, file)
        label_column = _find_column(schema, LABEL_COLUMNS, file)
        column = pq.read_table(file, columns=[label_column])[label_column]
    except (pa.ArrowException, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(
            f"data {file}: not a readable Parquet file ({reason}); fetch or convert it again"
        ) from error
    start, stop = rows or (0, len(column))
    if not 0 <= start < stop <= len(column):
        raise ConfigError(f"data {file}: rows {start}-{stop} are outside its {len(column)} rows")
    if not pa.types.is_integer(column.type):
        raise ArtifactError(f"data {file}: labels are {column.type}; they must be integers")
    chosen = np.arange(start, stop)
    if count is not None and count < len(chosen):
        chosen = chosen[np.arange(count) * len(chosen) // count]
    column = column.take(chosen)
    if column.null_count:
        row = chosen[column.is_null().to_numpy().argmax()]
        raise ArtifactError(f"data {file}, row {row}: no label; add it or remove the row")
    labels = column.to_numpy().astype(np.int64)
    classes = read_class_names(schema, label_column)
    if not classes:
        classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    outside = np.flatnonzero((labels < 0) | (labels >= len(classes)))
    if len(outside):
        first = outside[0]
        raise ArtifactError(
            f"data {file}, row {chosen[first]}: label {labels[first]} is outside the "
            f"{len(classes)} classes; mend the label or the class names"
        )
    return file, chosen, labels, classes


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


def _find_column(schema: pa.Schema, names: Sequence[str], file: Path) -> str:
    for name in names:
        if name in schema.names:
            return name
    raise ArtifactError(
        f"data {file}: none of the columns {', '.join(names)} among {', '.join(schema.names)}"
    )


def _decode(column: pa.ChunkedArray, file: Path, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
    if pa.types.is_struct(column.type):
        column = pa.chunked_array([c.field("bytes") for c in column.chunks], pa.binary())

    def decode(row: int, value: pa.BinaryScalar) -> NDArray[np.uint8]:
        try:
            image = Image.open(io.BytesIO(value.as_buffer()))
            return np.asarray(image.convert("RGB"))
        except (OSError, SyntaxError, ValueError, TypeError, AttributeError) as error:
            raise ArtifactError(
                f"data {file}, row {row}: cannot decode the image ({error}); "
                "remove or replace that row"
            ) from error

    with ThreadPoolExecutor() as pool:
        images = list(pool.map(decode, rows.tolist(), column))
    shapes = {image.shape for image in images}
    if len(shapes) > 1:
        raise ArtifactError(f"data {file}: images of several sizes {sorted(shapes)}; resize first")
    return np.stack(images)
