"""Augmented training batches of an epoch, which depend on the seed and the epoch alone."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import augment, erase, from_shared


@dataclass(frozen=True)
class Augmentation:
    """How an epoch's batches are drawn.

    Attributes:
        batch_size: Images in a batch, all workers together.
        padding: Pixels added on each side before the random crop.
        erasing: Share of images that lose a rectangle, in [0, 1].
        seed: Seed of all randomness.
    """

    batch_size: int
    padding: int
    erasing: float
    seed: int

    def generator(self, epoch: int, rank: int = 0) -> torch.Generator:
        """Source of an epoch's order (rank 0, shared by all workers) or of a worker's crops."""
        return torch.Generator().manual_seed(self.seed * 100_003 + epoch + rank * 1_000_003)

    def __call__(self, batch: ImageSet, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Normalised, cropped, flipped, erased images float32 (B, C, H, W), and labels (B,)."""
        x = augment(batch.images, batch.mean, batch.std, generator, self.padding)
        x = erase(x, self.erasing, generator) if self.erasing else x
        return x, from_shared(batch.labels)


@dataclass(frozen=True)
class ImageBatches:
    """Batches of images in memory, which stay uint8 and shared: only a batch is normalised.

    Attributes:
        images: Images of all workers.
        augmentation: How batches are drawn.
        shard: Index of this worker, and number of workers; each takes its part of every batch.
    """

    images: ImageSet
    augmentation: Augmentation
    shard: tuple[int, int] = (0, 1)

    @property
    def num_batches(self) -> int:
        """Batches in an epoch."""
        return -(-len(self.images) // self.augmentation.batch_size)

    def epoch(self, number: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Every image once, in a random order: float32 (B, C, H, W), and labels (B,)."""
        rank, size = self.shard
        generator = self.augmentation.generator(number)
        order = torch.randperm(len(self.images), generator=generator)
        if rank:
            generator = self.augmentation.generator(number, rank)
        for batch in order.split(self.augmentation.batch_size):
            if len(batch) < size:
                return  # a few images would leave workers without any
            yield self.augmentation(self.images.at(batch[rank::size].numpy()), generator)
