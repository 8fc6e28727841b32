"""Training images that are read anew every epoch, for data sets larger than memory.

An epoch visits the blocks of the source (row groups of Parquet) in random order, and each worker
reads its own part of that order. Decoded images wait in a buffer, from which batches are drawn at
random. The next part is read and decoded while the network trains.
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
from cacp_ray.data.images import ImageSet, Shape, decode
from cacp_ray.data.sources import Source

ROWS_A_PART = 512  # rows that are read and decoded together; more where a block is larger
PARTS_AHEAD = 2
BUFFER_BYTES = 2**28  # 1,780 images of 224 x 224


@dataclass(frozen=True)
class ImageStream:
    """Images of one split that are decoded when they are needed.

    Attributes:
        source: Where the images lie; every node must be able to read it.
        rows: (N,) rising rows of the source.
        labels: (N,), each in [0, number of classes).
        classes: Class names.
        shape: Colours and sizes of images.
        mean: (C,) channel means of images in [0, 1], for normalisation.
        std: (C,) channel standard deviations of images in [0, 1].
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
        """Reads and decodes the images at `places` (M,), rising indices into `rows`.

        Raises:
            ArtifactError: An image cannot be decoded, or images differ in size.
        """
        images = decode(self.source, self.rows[places], self.shape)
        return ImageSet(images, self.labels[places], self.classes, self.mean, self.std)

    def parts(self, size: int) -> Iterator[ImageSet]:
        """All images in order, `size` at a time; the next ones are decoded ahead."""
        places = np.arange(len(self))
        return _read_ahead(self, (places[i : i + size] for i in range(0, len(places), size)))

    def blocks(self) -> list[NDArray[np.int64]]:
        """Indices into `rows`, grouped by the block that the source reads as a whole."""
        numbers = np.searchsorted(self.source.blocks, self.rows, side="right")
        return np.split(np.arange(len(self)), np.flatnonzero(np.diff(numbers)) + 1)


@dataclass(frozen=True)
class StreamBatches:
    """Batches of a stream; memory holds the buffer and the parts ahead, never all images.

    Attributes:
        stream: Images of all workers.
        augmentation: How batches are drawn.
        shard: Index of this worker, and number of workers. Each reads its own part of the images,
            and all have equally many batches.
        buffer_bytes: Size of the decoded images that a batch is drawn from.
    """

    stream: ImageStream
    augmentation: Augmentation
    shard: tuple[int, int] = (0, 1)
    buffer_bytes: int = BUFFER_BYTES

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.stream) // self.augmentation.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in a random order: float32 (B, C, H, W), and labels (B,)."""
        rank, size = self.shard
        generator = self.augmentation.generator(number)
        blocks = self.stream.blocks()
        order = torch.randperm(len(blocks), generator=generator)
        if rank:
            generator = self.augmentation.generator(number, rank)
        rng = np.random.default_rng([self.augmentation.seed, number, rank])
        shares = [self._share_sizes(worker) for worker in range(size)]
        start = sum(map(sum, shares[:rank]))
        mine = _cut([blocks[i] for i in order], start, start + sum(shares[rank]))
        buffer = _Buffer(self.buffer_bytes, rng)
        parts = _read_ahead(self.stream, _join(mine))
        for share in shares[rank]:
            while not buffer.is_full(share) and (part := next(parts, None)) is not None:
                buffer.add(part)
            yield self.augmentation(buffer.draw(share), generator)

    def _share_sizes(self, rank: int) -> list[int]:
        """Sizes of a worker's shares; a last batch with too few images for all is left out."""
        count, batch_size, size = len(self.stream), self.augmentation.batch_size, self.shard[1]
        whole = [min(batch_size, count - start) for start in range(0, count, batch_size)]
        return [len(range(rank, length, size)) for length in whole if length >= size]


class _Buffer:
    """Decoded images, drawn without replacement."""

    def __init__(self, num_bytes: int, rng: np.random.Generator) -> None:
        self._num_bytes = num_bytes
        self._rng = rng
        self._count = 0
        self._held: ImageSet | None = None  # images in the first `_count` rows, then free rows

    def __len__(self) -> int:
        return self._count

    def is_full(self, share: int) -> bool:
        """Whether the buffer is full and holds at least `share` images."""
        if self._held is None or self._count < share:
            return False
        return self._held.images[: self._count].nbytes >= self._num_bytes

    def add(self, part: ImageSet) -> None:
        """Adds images; copies those it holds only where no free rows are left."""
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
        """Removes and returns `share` random images; the last ones fill the holes."""
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
    """The part [start, stop) of the concatenated blocks, still block by block."""
    ends = np.cumsum([len(block) for block in blocks])
    pieces = [
        block[max(0, start - (end - len(block))) : max(0, stop - (end - len(block)))]
        for block, end in zip(blocks, ends.tolist(), strict=True)
    ]
    return [piece for piece in pieces if len(piece)]


def _join(blocks: list[NDArray[np.int64]]) -> Iterator[NDArray[np.int64]]:
    """Rising indices of about ROWS_A_PART images; blocks stay whole unless they are larger."""
    part: list[NDArray[np.int64]] = []
    for block in blocks:
        for piece in np.array_split(block, -(-len(block) // ROWS_A_PART)):
            part.append(piece)
            if sum(map(len, part)) >= ROWS_A_PART:
                yield np.sort(np.concatenate(part))
                part = []
    if part:
        yield np.sort(np.concatenate(part))
