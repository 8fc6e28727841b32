"""Summary of a data set: rows, classes, sizes, and the first image that cannot be decoded."""

import io
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cacp_ray.data.images import DECODE_ERRORS, Rows, check_size, describe_error, read_labels
from cacp_ray.data.limits import MAX_PIXELS
from cacp_ray.data.sources import Source

DECODED_TOGETHER = 256


@dataclass(frozen=True)
class DataSummary:
    """Contents of a data set.

    Attributes:
        rows: Number of all images.
        classes: Class names.
        per_class: (C,) images of each class.
        decoded: Images that were decoded.
        sizes: Number of decoded images by (width, height).
        modes: Number of decoded images by colour mode, as PIL names it.
        num_bytes: Encoded size of the decoded images.
        broken: Place of the first image that cannot be decoded, and the reason; else empty.
    """

    rows: int
    classes: tuple[str, ...]
    per_class: NDArray[np.int64]
    decoded: int
    sizes: Counter[tuple[int, int]]
    modes: Counter[str]
    num_bytes: int
    broken: str


def summarize(source: Source, count: int | None) -> DataSummary:
    """Reads all labels, and `count` evenly spaced images, or all for None.

    Raises:
        CacpError: Labels cannot be read, or are outside the classes.
    """
    _, labels, classes = read_labels(source, Rows())
    rows, _, _ = read_labels(source, Rows(count=count))
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    num_bytes, decoded, broken = 0, 0, ""

    def inspect(item: tuple[int, bytes | None]) -> tuple[int, tuple[int, int], str] | str:
        row, data = item
        try:
            image = Image.open(io.BytesIO(data or b""))
            mode = image.mode
            check_size(*image.size, MAX_PIXELS)
            image.convert("RGB")
        except DECODE_ERRORS as error:
            return f"{source.where(row)}: {describe_error(error)}"
        return len(data or b""), image.size, mode

    items = source.read(rows)
    with ThreadPoolExecutor() as pool:
        while part := list(itertools.islice(items, DECODED_TOGETHER)):
            for outcome in pool.map(inspect, part):
                if isinstance(outcome, str):
                    broken = broken or outcome
                    continue
                length, size, mode = outcome
                sizes[size] += 1
                modes[mode] += 1
                num_bytes += length
                decoded += 1
    per_class = np.bincount(labels, minlength=len(classes))
    return DataSummary(len(labels), classes, per_class, decoded, sizes, modes, num_bytes, broken)


def describe(name: str, summary: DataSummary) -> list[str]:
    """A summary as lines of text."""
    per_class = summary.per_class
    smallest, largest = int(per_class.argmin()), int(per_class.argmax())
    lines = [
        f"{name}: {summary.rows:,} images of {len(summary.classes):,} classes",
        f"images a class: {per_class.min():,} ({summary.classes[smallest]}) to {per_class.max():,} "
        f"({summary.classes[largest]}), median {np.median(per_class):,.0f}",
    ]
    if summary.decoded:
        sides = np.array([size for size, number in summary.sizes.items() for _ in range(number)])
        low, middle, high = (np.quantile(sides, q, axis=0).astype(int) for q in (0, 0.5, 1))
        kinds = ", ".join(f"{mode} {number:,}" for mode, number in summary.modes.most_common())
        lines += [
            f"{summary.decoded:,} images looked at: {len(summary.sizes):,} sizes",
            f"width {low[0]} to {high[0]} (median {middle[0]}), "
            f"height {low[1]} to {high[1]} (median {middle[1]})",
            f"{summary.num_bytes / summary.decoded / 1e3:,.1f} kB an image; colours: {kinds}",
        ]
    if not summary.broken:
        lines.append("all of them decode")
    return lines
