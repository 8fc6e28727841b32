"""Training images a second: streamed shards, against folders and a DataLoader.

python bench/loader.py [--images 2000] [--workers 2]

The images have ImageNet's shape and are made from the embedded sample (enlarged to 224-256 pixels,
JPEG). Both ways give shuffled, cropped, flipped, normalised float32 batches of 224 pixels: ours
from Parquet shards (`data.stream`), decoding on threads; torchvision's ImageFolder through a
DataLoader with worker processes. Epochs are interleaved; all processes share the same cores.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from report import print_environment, print_table
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

from cacp_ray.data.batches import Augmentation
from cacp_ray.data.images import Rows, Shape, read_labels, read_parquet
from cacp_ray.data.sources import open_source
from cacp_ray.data.streams import ImageStream, StreamBatches

BATCH, SHARDS, EPOCHS, PADDING = 64, 20, 5, 4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_images(root, options.images)
        ways: dict[str, Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]] = {
            "shards, streamed": streamed(root),
            "ImageFolder, DataLoader": loaded(root, options.workers),
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for epoch in range(EPOCHS + 1):
            for name, batches in ways.items():
                started = time.perf_counter()
                count = sum(len(y) for x, y in batches(epoch) if x.shape[1:] == (3, 224, 224))
                assert count == options.images
                if epoch:  # the first fills caches of the disk
                    speeds[name].append(count / (time.perf_counter() - started))
    ours, theirs = map(np.array, speeds.values())
    ratios = ours / theirs
    rows = [
        [name, f"{np.median(speed):.0f}", f"{min(speed):.0f}-{max(speed):.0f}"]
        for name, speed in speeds.items()
    ]
    title = (
        f"Images a second: {options.images:,} images, {options.workers} workers, {EPOCHS} epochs"
    )
    print_table(title, ["way", "median", "range"], rows)
    print(f"\nOurs over theirs: {np.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}).")
    print_environment(0)


def write_images(root: Path, count: int) -> None:
    """Writes the same JPEG files as shards and as folders."""
    split = read_parquet("embedded:train", (0, count))
    rng = np.random.default_rng(0)
    rows = []
    (root / "shards").mkdir()
    for number, (image, label) in enumerate(zip(split.images, split.labels.tolist(), strict=True)):
        size = tuple(rng.integers(224, 257, size=2).tolist())
        path = root / "folders" / split.classes[label] / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
        rows.append({"image": {"bytes": path.read_bytes(), "path": path.name}, "label": label})
    for number in range(SHARDS):
        table = pa.Table.from_pylist(rows[number::SHARDS])
        pq.write_table(table, root / "shards" / f"train-{number:05d}.parquet")


def streamed(root: Path) -> Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]:
    """Our batches, as fine-tuning reads them with `data.stream`."""
    source = open_source(str(root / "shards"))
    stream = ImageStream(source, *read_labels(source, Rows()), Shape(resize=232, crop=224))
    return StreamBatches(stream, Augmentation(BATCH, PADDING, erasing=0.0, seed=0)).epoch


def loaded(
    root: Path, workers: int
) -> Callable[[int], Iterable[tuple[torch.Tensor, torch.Tensor]]]:
    """Batches as in torchvision's reference scripts, with the same crops."""
    steps = [
        transforms.Resize(232),
        transforms.CenterCrop(224),
        transforms.RandomCrop(224, padding=PADDING),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    folder = datasets.ImageFolder(str(root / "folders"), transforms.Compose(steps))
    loader = DataLoader(folder, BATCH, shuffle=True, num_workers=workers, persistent_workers=True)
    return lambda _: loader


if __name__ == "__main__":
    main()
