"""Training images that are read again every epoch, for data sets that memory does not hold.

An epoch goes through the blocks of the source (row groups of Parquet) in a random order, each
worker through its own part of that order. Decoded images wait in a buffer, from which batches are
drawn at random. The next part is read and decoded while the network trains.
"""

import dataclasses
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cacp_ray.data import cifar10
from cacp_ray.data.batches import Augmentation
from cacp_ray.data.images import ImageSet, Rows, Shape, decode, read_labels
from cacp_ray.data.sources import Source

ROWS_A_PART = 512  # read and decoded together, more where a block is larger
PARTS_AHEAD = 2
BUFFER_BYTES = 2**28  # 1,780 images of 224 x 224


@dataclass(frozen=True)
class ImageStream:
    """Images of one split that are decoded when they are asked for.

    Attributes:
        source: Where they lie; readable on all nodes.
        rows: (N,) of the source, rising.
        labels: (N,), each in [0, num_classes).
        classes: Class names.
        shape: What becomes of an image.
        mean: As of `ImageSet`.
        std: As of `ImageSet`.
    """

    source: Source
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    shape: Shape
    mean: tuple[float, ...] = cifar10.MEAN
    std: tuple[float, ...] = cifar10.STD

    def __len__(self) -> int:
        return len(self.rows)

    def at(self, places: NDArray[np.int64]) -> ImageSet:
        """Reads and decodes the images at `places` (M,), rising, of `rows`.

        Raises:
            ArtifactError: One cannot be decoded, or they differ in size.
        """
        images = decode(self.source, self.rows[places], self.shape)
        return ImageSet(images, self.labels[places], self.classes, self.mean, self.std)

    def parts(self, size: int) -> Iterator[ImageSet]:
        """All images in their order, `size` at a time; the next ones are decoded meanwhile."""
        places = np.arange(len(self))
        return _read_ahead(self, (places[i : i + size] for i in range(0, len(places), size)))

    def blocks(self) -> list[NDArray[np.int64]]:
        """Places of `rows`, by what the source reads together."""
        numbers = np.searchsorted(self.source.blocks, self.rows, side="right")
        return np.split(np.arange(len(self)), np.flatnonzero(np.diff(numbers)) + 1)


def open_stream(source: Source, rows: Rows, shape: Shape) -> ImageStream:
    """Reads the labels of a split and leaves the images where they lie.

    Raises:
        ArtifactError: As of `read_labels`.
    """
    chosen, labels, classes = read_labels(source, rows)
    return ImageStream(source, chosen, labels, classes, shape)


@dataclass(frozen=True)
class StreamBatches:
    """Batches of a stream; memory holds the buffer and the parts ahead, never all images.

    Attributes:
        stream: All images.
        augmentation: Of the batches.
        shard: Number of this worker and of all; each reads its part of the images alone, and all
            have equally many batches.
        buffer_bytes: Decoded images among which a batch is drawn.
    """

    stream: ImageStream
    augmentation: Augmentation
    shard: tuple[int, int] = (0, 1)
    buffer_bytes: int = BUFFER_BYTES

    @property
    def num_batches(self) -> int:
        """Of an epoch."""
        return -(-len(self.stream) // self.augmentation.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in a random order that depends on the seed and the epoch alone."""
        rank, size = self.shard
        generator = self.augmentation.generator(number)
        blocks = self.stream.blocks()
        order = torch.randperm(len(blocks), generator=generator)
        if rank:
            generator = self.augmentation.generator(number, rank)
        rng = np.random.default_rng([self.augmentation.seed, number, rank])
        shares = [self._share_sizes(each) for each in range(size)]
        start = sum(map(sum, shares[:rank]))
        mine = _cut([blocks[i] for i in order], start, start + sum(shares[rank]))
        buffer = _Buffer(self.buffer_bytes, rng)
        parts = _read_ahead(self.stream, _join(mine))
        for share in shares[rank]:
            while not buffer.is_full(share) and (part := next(parts, None)) is not None:
                buffer.add(part)
            yield self.augmentation(buffer.draw(share), generator)

    def _share_sizes(self, rank: int) -> list[int]:
        """Images of each batch of a worker; a last batch that leaves one without is left out."""
        count, batch_size, size = len(self.stream), self.augmentation.batch_size, self.shard[1]
        whole = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        return [len(range(rank, each, size)) for each in whole if each >= size]


class _Buffer:
    """Decoded images, drawn without replacement."""

    def __init__(self, num_bytes: int, rng: np.random.Generator) -> None:
        self._num_bytes = num_bytes
        self._rng = rng
        self._count = 0
        self._held: ImageSet | None = None  # the first `_count` rows; the others are room

    def __len__(self) -> int:
        return self._count

    def is_full(self, share: int) -> bool:
        """Whether a batch of `share` images can be drawn from enough others."""
        if self._held is None or self._count < share:
            return False
        return self._held.images[: self._count].nbytes >= self._num_bytes

    def add(self, part: ImageSet) -> None:
        """Takes images in; only where there is no room left are those there copied."""
        count = self._count + len(part)
        if self._held is None or count > len(self._held):
            rows = max(count, self._num_bytes // part.images[:1].nbytes + len(part))
            images = np.empty((rows, *part.images.shape[1:]), part.images.dtype)
            labels = np.empty(rows, part.labels.dtype)
            if self._held is not None:
                images[: self._count] = self._held.images[: self._count]
                labels[: self._count] = self._held.labels[: self._count]
            self._held = dataclasses.replace(part, images=images, labels=labels)
        self._held.images[self._count : count] = part.images
        self._held.labels[self._count : count] = part.labels
        self._count = count

    def draw(self, share: int) -> ImageSet:
        """Gives `share` of them; the last ones take their places."""
        held = self._held
        assert held is not None
        chosen = self._rng.choice(self._count, share, replace=False)
        drawn = held.at(chosen)
        left = self._count - share
        holes = chosen[chosen < left]
        last = np.setdiff1d(np.arange(left, self._count), chosen)
        held.images[holes], held.labels[holes] = held.images[last], held.labels[last]
        self._count = left
        return drawn


def _read_ahead(stream: ImageStream, places: Iterable[NDArray[np.int64]]) -> Iterator[ImageSet]:
    parts = iter(places)
    waiting = deque()
    with ThreadPoolExecutor(1) as pool:
        while True:
            while len(waiting) < PARTS_AHEAD and (part := next(parts, None)) is not None:
                waiting.append(pool.submit(stream.at, part))
            if not waiting:
                return
            yield waiting.popleft().result()


def _cut(blocks: list[NDArray[np.int64]], start: int, stop: int) -> list[NDArray[np.int64]]:
    """What lies in [start, stop) of the blocks one after another."""
    ends = np.cumsum([len(block) for block in blocks])
    pieces = [
        block[max(0, start - (end - len(block))) : max(0, stop - (end - len(block)))]
        for block, end in zip(blocks, ends.tolist(), strict=True)
    ]
    return [piece for piece in pieces if len(piece)]


def _join(blocks: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Rising places of about ROWS_A_PART images; whole blocks, unless they are larger."""
    part: list[NDArray[np.int64]] = []
    for block in blocks:
        for piece in np.array_split(block, -(-len(block) // ROWS_A_PART)):
            part.append(piece)
            if sum(map(len, part)) >= ROWS_A_PART:
                yield np.sort(np.concatenate(part))
                part = []
    if part:
        yield np.sort(np.concatenate(part))
