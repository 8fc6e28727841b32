"""What a data set holds: rows, classes, sizes, and the first image that cannot be decoded."""

import io
import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cacp_ray.data.images import DECODE_ERRORS, Rows, describe_error, read_labels
from cacp_ray.data.sources import Source

DECODED_TOGETHER = 256


@dataclass(frozen=True)
class DataSummary:
    """Of a data set.

    Attributes:
        rows: Images in all.
        classes: Names.
        per_class: (C,) images of each.
        decoded: Images that were looked at.
        sizes: (width, height) -> how many of them.
        modes: Of colour, as PIL names them -> how many of them.
        num_bytes: Of them, encoded.
        broken: Where the first one lies that cannot be decoded, and why; empty if all can.
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
    """Reads all labels, and `count` images, evenly spaced, or all of them.

    Raises:
        CacpError: Labels cannot be read, or are outside the classes.
    """
    _, labels, classes = read_labels(source, Rows())
    rows, _, _ = read_labels(source, Rows(count=count))
    sizes: Counter[tuple[int, int]] = Counter()
    modes: Counter[str] = Counter()
    num_bytes, decoded, broken = 0, 0, ""

    def look(item: tuple[int, bytes | None]) -> tuple[int, int, tuple[int, int], str, str]:
        row, data = item
        try:
            image = Image.open(io.BytesIO(data or b""))
            mode = image.mode
            image.convert("RGB")
        except DECODE_ERRORS as error:
            return row, 0, (0, 0), "", describe_error(error)
        return row, len(data or b""), image.size, mode, ""

    items = source.read(rows)
    with ThreadPoolExecutor() as pool:
        while part := list(itertools.islice(items, DECODED_TOGETHER)):
            for row, length, size, mode, error in pool.map(look, part):
                if error:
                    broken = broken or f"{source.where(row)}: {error}"
                    continue
                sizes[size] += 1
                modes[mode] += 1
                num_bytes += length
                decoded += 1
    per_class = np.bincount(labels, minlength=len(classes))
    return DataSummary(len(labels), classes, per_class, decoded, sizes, modes, num_bytes, broken)


def describe(name: str, found: DataSummary) -> list[str]:
    """The summary as lines."""
    per_class = found.per_class
    smallest, largest = int(per_class.argmin()), int(per_class.argmax())
    lines = [
        f"{name}: {found.rows:,} images of {len(found.classes):,} classes",
        f"images a class: {per_class.min():,} ({found.classes[smallest]}) to {per_class.max():,} "
        f"({found.classes[largest]}), median {np.median(per_class):,.0f}",
    ]
    if found.decoded:
        sides = np.array([size for size, number in found.sizes.items() for _ in range(number)])
        low, middle, high = (np.quantile(sides, q, axis=0).astype(int) for q in (0, 0.5, 1))
        kinds = ", ".join(f"{mode} {number:,}" for mode, number in found.modes.most_common())
        lines += [
            f"{found.decoded:,} images looked at: {len(found.sizes):,} sizes, width {low[0]} to "
            f"{high[0]} (median {middle[0]}), height {low[1]} to {high[1]} (median {middle[1]})",
            f"{found.num_bytes / found.decoded / 1e3:,.1f} kB an image; colours: {kinds}",
        ]
    lines.append(f"cannot be decoded: {found.broken}" if found.broken else "all of them decode")
    return lines
