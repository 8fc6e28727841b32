"""Labelled images in memory: which rows of a source are read, and how they are decoded."""

import dataclasses
import io
import itertools
import logging
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from cacp_ray.data import cifar10
from cacp_ray.data.limits import MAX_PIXELS
from cacp_ray.data.parquet import NO_LABEL
from cacp_ray.data.sources import Source, open_source
from cacp_ray.data.transforms import from_shared, to_normalized
from cacp_ray.errors import ArtifactError, ConfigError

Interpolation = Literal["bilinear", "bicubic"]

logger = logging.getLogger(__name__)
# `Shape` has a limit of its own, and says so in one line.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

DECODED_TOGETHER = 512
PROGRESS_SECONDS = 10.0
DEEP = ("I", "F")  # Pillow's modes of more than 8 bits: converting clips them
MAX_UNNAMED_CLASSES = 100_000  # a larger label is taken for a mistake
# Pillow raises these at bytes that are no image or too large an image.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, AttributeError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True)
class ImageSet:
    """Decoded images of one split, in file order.

    Attributes:
        images: uint8 (N, H, W, C): red, green and blue, or one gray channel.
        labels: int64 (N,), each in [0, number of classes).
        classes: Class names.
        mean: (C,) channel means of images in [0, 1], for normalisation.
        std: (C,) channel standard deviations of images in [0, 1].
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    mean: tuple[float, ...] = cifar10.MEAN
    std: tuple[float, ...] = cifar10.STD

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, count: int | None) -> "ImageSet":
        """The first `count` images; all of them where there are fewer, or for None."""
        return self.slice(0, count)

    def slice(self, start: int, stop: int | None) -> "ImageSet":
        """Images [start, stop), without a copy."""
        rows = slice(start, stop)
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])

    def at(self, rows: NDArray[np.int64]) -> "ImageSet":
        """A copy of the images at `rows` (M,)."""
        return dataclasses.replace(self, images=self.images[rows], labels=self.labels[rows])

    def parts(self, size: int) -> Iterator["ImageSet"]:
        """All images in order, `size` at a time."""
        return (self.slice(start, start + size) for start in range(0, len(self), size))

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Normalised images float32 (N, C, H, W), channels_last, and labels (N,)."""
        return to_normalized(self.images, self.mean, self.std), from_shared(self.labels)


@dataclass(frozen=True)
class Rows:
    """Selection of a source's rows.

    Attributes:
        span: [start, stop); all rows by default.
        per_class: Number of rows drawn of each class; a class with fewer gives all it has.
        without: Whether to take all rows but the drawn ones.
        seed: Seed of the draw.
        count: Number of the selected rows to keep, evenly spaced; all by default.
        num_classes: Number of classes where they have no names; by default one more than the
            largest label of the source.
    """

    span: tuple[int, int] | None = None
    per_class: int | None = None
    without: bool = False
    seed: int = 0
    count: int | None = None
    num_classes: int | None = None


@dataclass(frozen=True)
class Shape:
    """Colours, resizing and cropping of decoded images, as torchvision resizes and crops.

    By default, images are RGB and as large as they are.

    Attributes:
        resize: Length of the shorter side in pixels.
        crop: Side of the central square that is kept, in pixels.
        interpolation: How pixels are resampled.
        max_pixels: Larger images are refused: decoded, a few of them would fill the memory.
        is_gray: Whether they are read as one gray channel.
    """

    resize: int | None = None
    crop: int | None = None
    interpolation: Interpolation = "bilinear"
    max_pixels: int = MAX_PIXELS
    is_gray: bool = False

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resizes and crops an image.

        Raises:
            ValueError: It has more than `max_pixels`, before or after that, or is to be gray and
                has more than 8 bits.
        """
        check_size(*image.size, self.max_pixels)
        if self.is_gray and image.mode.startswith(DEEP):
            raise ValueError(f"mode {image.mode}, which 8 bits would cut off; scale it to 8 bits")
        image = image.convert("L" if self.is_gray else "RGB")
        if self.resize is not None:
            shorter = min(image.size)
            width, height = (int(self.resize * side / shorter) for side in image.size)
            check_size(width, height, self.max_pixels)
            filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
            image = image.resize((width, height), filters[self.interpolation])
        if self.crop is not None:
            left, top = (
                round((side - self.crop) / 2) if side >= self.crop else -((self.crop - side) // 2)
                for side in image.size
            )
            image = image.crop((left, top, left + self.crop, top + self.crop))
        return image


def read_parquet(
    path: str, rows: tuple[int, int] | None = None, count: int | None = None
) -> ImageSet:
    """Reads and decodes rows [start, stop), or `count` of them, as `read_images` does."""
    return read_images(open_source(path), Rows(span=rows, count=count))


def read_images(source: Source, rows: Rows, shape: Shape | None = None) -> ImageSet:
    """Reads and decodes rows of a source.

    Raises:
        ConfigError: No such rows, or none left.
        ArtifactError: The source is corrupt, has no image or label column, holds an image that
            cannot be decoded, images of several sizes, or a label outside the classes.
    """
    chosen, labels, classes = read_labels(source, rows)
    images = decode(source, chosen, shape or Shape())
    return ImageSet(images, labels, classes)


def read_labels(
    source: Source, rows: Rows
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """Rising row numbers (N,), labels (N,) and class names of selected rows.

    Arguments and errors are those of `read_images`.
    """
    labels = source.labels
    start, stop = rows.span or (0, len(labels))
    if not 0 <= start < stop <= len(labels):
        raise ConfigError(
            f"data {source.name}: rows {start}-{stop} are outside its {len(labels)} rows"
        )
    chosen = np.arange(start, stop)
    classes = source.classes or _number_classes(source, rows.num_classes)
    if rows.num_classes not in (None, len(classes)):
        raise ConfigError(
            f"data.num_classes {rows.num_classes}: {source.name} names {len(classes)} classes; "
            "leave it out"
        )
    _check_labels(source, chosen, len(classes))
    if rows.per_class is not None:
        blocks = np.searchsorted(source.blocks, chosen, side="right") - 1
        drawn = draw_per_class(labels[chosen], blocks, rows.per_class, rows.seed)
        chosen = chosen[np.setdiff1d(np.arange(len(chosen)), drawn) if rows.without else drawn]
    if not len(chosen):
        raise ConfigError(
            f"data {source.name}: images_per_class {rows.per_class} leaves no image for training: "
            "draw fewer"
        )
    if rows.count is not None and rows.count < len(chosen):
        chosen = chosen[np.arange(rows.count) * len(chosen) // rows.count]
    return chosen, labels[chosen], classes


def _number_classes(source: Source, number: int | None) -> tuple[str, ...]:
    """Numbers as names for the classes of all rows, so that every selection has the same names."""
    if number is not None:
        return tuple(str(label) for label in range(number))
    largest = int(source.labels.max())
    if largest >= MAX_UNNAMED_CLASSES:
        where = source.where(int(source.labels.argmax()))
        raise ArtifactError(
            f"data {where}: label {largest}, and there are no class names; mend the label, or name "
            "the classes in the schema"
        )
    return tuple(str(label) for label in range(largest + 1))


def _check_labels(source: Source, rows: NDArray[np.int64], num_classes: int) -> None:
    labels = source.labels[rows]
    if len(none := np.flatnonzero(labels == NO_LABEL)):
        where = source.where(int(rows[none[0]]))
        raise ArtifactError(f"data {where}: no label; add it or remove the row")
    if len(outside := np.flatnonzero((labels < 0) | (labels >= num_classes))):
        where = source.where(int(rows[outside[0]]))
        is_from_one = source.labels.min() == 1 and source.labels.max() == num_classes
        step = (
            "labels begin at 1 here: subtract 1 from each"
            if is_from_one
            else ("mend the label or the class names")
        )
        raise ArtifactError(
            f"data {where}: label {labels[outside[0]]} is outside the {num_classes} classes, which "
            f"begin at 0; {step}"
        )


def draw_per_class(
    labels: NDArray[np.int64], blocks: NDArray[np.int64], count: int, seed: int
) -> NDArray[np.int64]:
    """Draws `count` entries of every label from few blocks.

    Blocks are visited in random order. A block gives each label one random entry, and a second only
    when all blocks have given one. So few blocks of shuffled rows are read, and the entries of a
    label still lie apart where rows are sorted. A label with fewer entries gives all it has.

    `labels` and `blocks` are (N,), a block being an index from 0. Returns rising indices (M,).
    """
    # These numbers stay the same when rows or blocks are added at the end.
    visited = np.random.default_rng([seed, 0]).random(int(blocks.max()) + 1)
    chance = np.random.default_rng([seed, 1]).random(len(labels))
    places = np.lexsort((chance, blocks, labels))
    turn = _count_within(labels[places], blocks[places])
    places = places[np.lexsort((visited[blocks[places]], turn, labels[places]))]
    return np.sort(places[_count_within(labels[places]) < count])


def _count_within(*keys: NDArray[np.int64]) -> NDArray[np.int64]:
    """(N,) number of entries directly before each one that have the same keys (N,)."""
    begins = np.any([np.diff(key, prepend=key[:1] - 1) != 0 for key in keys], axis=0)
    firsts = np.flatnonzero(begins)
    lengths = np.diff(np.append(firsts, len(begins)))
    return np.arange(len(begins)) - np.repeat(firsts, lengths)


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuses an image of more pixels.

    Raises:
        ValueError: It has more.
    """
    if width * height > max_pixels:
        raise ValueError(
            f"{width:,} x {height:,} pixels, more than data.max_pixels allows ({max_pixels:,})"
        )


def describe_error(error: Exception) -> str:
    """Message of an error of Pillow's, without object addresses."""
    return "no image" if isinstance(error, UnidentifiedImageError) else str(error)


def decode(source: Source, rows: NDArray[np.int64], shape: Shape) -> NDArray[np.uint8]:
    """Images uint8 (N, H, W, C) at rising `rows` (N,).

    Raises:
        ArtifactError: An image cannot be decoded, or images differ in size.
    """

    def decode_one(item: tuple[int, bytes | None]) -> NDArray[np.uint8]:
        row, data = item
        try:
            image = Image.open(io.BytesIO(data or b""))
            return np.atleast_3d(np.asarray(shape(image)))  # (H, W, C)
        except DECODE_ERRORS as error:
            raise ArtifactError(
                f"data {source.where(row)}: cannot decode the image ({describe_error(error)}); "
                "remove or replace that row"
            ) from error

    images: NDArray[np.uint8] | None = None
    with ThreadPoolExecutor() as pool:
        # In parts: encoded images of a whole split would take as much memory again.
        items = source.read(rows)
        done, say_at = 0, time.monotonic() + PROGRESS_SECONDS
        while part := list(itertools.islice(items, DECODED_TOGETHER)):
            decoded = list(pool.map(decode_one, part))
            if images is None:
                images = np.empty((len(rows), *decoded[0].shape), np.uint8)
            if shapes := {image.shape for image in decoded} - {images.shape[1:]}:
                raise ArtifactError(
                    f"data {source.name}: images of several sizes "
                    f"{sorted({*shapes, images.shape[1:]})}; resize first, or set data.resize and "
                    "data.crop"
                )
            images[done : done + len(part)] = decoded
            done += len(part)
            if time.monotonic() > say_at and done < len(rows):
                say_at = time.monotonic() + PROGRESS_SECONDS
                logger.info(
                    "data %s: %s of %s images read", source.name, f"{done:,}", f"{len(rows):,}"
                )
    assert images is not None
    return images
