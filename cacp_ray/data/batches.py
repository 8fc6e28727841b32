"""Augmented training batches, epoch by epoch: they depend on the seed and the epoch alone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import augment, erase, from_shared


@dataclass(frozen=True)
class Augmentation:
    """How an epoch's batches are drawn.

    Attributes:
        batch_size: Images a batch, of all shards together.
        padding: Pixels of the random crop.
        erasing: Share of images that lose a rectangle.
        seed: Of everything random.
    """

    batch_size: int
    padding: int
    erasing: float
    seed: int

    def generator(self, epoch: int, rank: int = 0) -> torch.Generator:
        """The only source of an epoch's order; and of the crops of each worker."""
        return torch.Generator().manual_seed(self.seed * 100_003 + epoch + rank * 1_000_003)

    def __call__(self, batch: ImageSet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Cropped, flipped, perhaps erased images float32 (B, C, H, W), normalised, and labels."""
        x = augment(batch.images, batch.mean, batch.std, generator, self.padding)
        x = erase(x, self.erasing, generator) if self.erasing else x
        return x, from_shared(batch.labels)


class Batches(Protocol):
    """Training images that are read again every epoch."""

    @property
    def shard(self) -> tuple[int, int]:
        """Number of this worker and of all."""
        ...

    @property
    def num_batches(self) -> int:
        """Of an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented images float32 (B, C, H, W) and labels (B,)."""
        ...


@dataclass(frozen=True)
class ImageBatches:
    """Of images in memory; normalised batch by batch, so that they stay uint8 and shared.

    Attributes:
        images: All of them.
        augmentation: Of the batches.
        shard: Number of this worker and of all; each has its part of every batch.
    """

    images: ImageSet
    augmentation: Augmentation
    shard: tuple[int, int] = (0, 1)

    @property
    def num_batches(self) -> int:
        """Of an epoch."""
        return -(-len(self.images) // self.augmentation.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in a random order."""
        rank, size = self.shard
        generator = self.augmentation.generator(number)
        order = torch.randperm(len(self.images), generator=generator)
        if rank:
            generator = self.augmentation.generator(number, rank)
        for batch in order.split(self.augmentation.batch_size):
            if len(batch) < size:
                return  # a few images would leave workers without any
            yield self.augmentation(self.images.at(batch[rank::size].numpy()), generator)
