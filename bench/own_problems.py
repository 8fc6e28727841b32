"""Problems other than image classification: networks, real data, losses and scores.

`bench/own_tasks.py` trains and searches them. Every data set has three disjoint parts.
"""

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import LRASPP

from cacp_ray.data.images import read_parquet

Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Data:
    """Inputs and wanted outputs of three disjoint parts; the network takes all but the last."""

    train: Batch
    search: Batch
    test: Batch


@dataclass(frozen=True)
class Problem:
    """A network, its data, its loss and its score; higher is better."""

    make: Callable[[], nn.Module]
    data: Data
    loss: Callable[[Any, Tensor], Tensor]
    answer: Callable[[Any], Tensor]  # what the score compares, of an output
    score: Callable[[Tensor, Tensor], Tensor]
    metric: str
    epochs: int  # of the whole network; subnets are trained for a third of them
    rate: float = 2e-3

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """Training data in random order."""
        order = torch.randperm(len(self.data.train[0]))
        for part in order.split(size):
            yield tuple(column[part] for column in self.data.train)

    def measure(self, net: nn.Module, name: str) -> float:
        """Score of a network on a part of the data."""
        *inputs, wanted = getattr(self.data, name)
        net.eval()
        with torch.no_grad():
            parts = zip(*(column.split(250) for column in inputs), strict=True)
            answers = torch.cat([self.answer(net(*part)) for part in parts])
        return float(self.score(answers, wanted))

    def train(self, net: nn.Module, epochs: int, seed: int, context: Any = None) -> None:
        """Trains with Adam and a cosine; reports every epoch where there is a context."""
        optimizer = torch.optim.Adam(net.parameters(), self.rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        begin = 0
        if context is not None and context.state is not None:
            begin = context.epoch
            optimizer.load_state_dict(context.state["optimizer"])
            scheduler.load_state_dict(context.state["scheduler"])
        for epoch in range(begin, epochs):
            torch.manual_seed(1000 * seed + epoch)
            net.train()
            for *inputs, wanted in self.batches():
                optimizer.zero_grad()
                self.loss(net(*inputs), wanted).backward()
                optimizer.step()
            scheduler.step()
            if context is not None:
                state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
                context.report(net, state)


class Block(nn.Module):
    """A residual block without normalisation."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, inner, 3, padding=1)
        self.second = nn.Conv2d(inner, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W) to the same shape."""
        return x + self.second(self.first(x).relu())


class Upscaler(nn.Module):
    """Residual blocks and a pixel shuffle on top of the enlarged image, in the manner of EDSR.

    Lim et al., 2017; the shuffle is that of ESPCN (Shi et al., 2016).
    """

    def __init__(self, width: int = 8, inner: int = 24, blocks: int = 4, scale: int = 3) -> None:
        super().__init__()
        self.scale = scale
        self.head = nn.Conv2d(1, width, 3, padding=1)
        self.body = nn.Sequential(*(Block(width, inner) for _ in range(blocks)))
        self.tail = nn.Conv2d(width, scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, small: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, 1, scale H, scale W)."""
        large = functional.interpolate(small, scale_factor=self.scale, mode="bilinear")
        return large + self.shuffle(self.tail(self.body(self.head(small))))


def make_segmenter(width: float = 0.35, classes: int = 2) -> nn.Module:
    """LRASPP of torchvision on a narrow MobileNetV3; details come from a quarter of the sides."""
    body = torchvision.models.mobilenet_v3_large(width_mult=width, dilated=True).features
    low, high = 3, len(body) - 1
    layers = IntermediateLayerGetter(body, {str(low): "low", str(high): "high"})
    return LRASPP(layers, body[low].out_channels, body[high].out_channels, classes, 32)


class Sequence(nn.Module):
    """A residual network over one dimension."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * width, 5, padding=2),
                nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Conv1d(2 * width, width, 5, padding=2),
            )
            for _ in range(4)
        )  # fmt: skip
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 64) to (N, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(functional.adaptive_avg_pool1d(x.relu(), 8).flatten(1))


class Siamese(nn.Module):
    """One trunk for both inputs, and a head over their product and difference."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width),
            nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(16 * width, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two images to the scores of different and same (N, 2)."""
        a, b = self.trunk(first), self.trunk(second)
        return self.head(torch.cat([a * b, (a - b).abs()], 1))


def read_images(file: Path, rows: tuple[int, int]) -> Tensor:
    """CIFAR-10 images (N, 3, 32, 32) in [0, 1]."""
    images = torch.from_numpy(read_parquet(str(file), rows).images)
    return images.permute(0, 3, 1, 2).float() / 255


def read_photographs(file: Path, rows: tuple[int, int]) -> Iterator[Image.Image]:
    """Photographs in their own sizes."""
    for cell in pq.read_table(file, columns=["image"])["image"][slice(*rows)].to_pylist():
        yield Image.open(io.BytesIO(cell["bytes"]))


def accuracy(answers: Tensor, wanted: Tensor) -> Tensor:
    return (answers == wanted).float().mean()


def mean_iou(answers: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union of all pixels of a class, averaged over the classes."""
    both = [((answers == c) & (wanted == c)).sum() for c in range(int(wanted.max()) + 1)]
    either = [((answers == c) | (wanted == c)).sum() for c in range(len(both))]
    return (torch.stack(both) / torch.stack(either)).mean()


def choose_class(scores: Tensor) -> Tensor:
    return scores.argmax(1)


def make_upscaling(options: Any) -> Problem:
    """Three times the sides of gray parts of photographs, of which half sizes are taken."""

    def pairs(file: Path, rows: tuple[int, int], parts: int) -> Batch:
        rng, large = np.random.default_rng(rows), []
        for image in read_photographs(file, rows):
            sides = [max(48, side // 2) for side in image.size]
            pixels = np.asarray(image.convert("L").resize(sides, Image.Resampling.BICUBIC))
            for _ in range(parts):
                r, c = (rng.integers(0, side - 47) for side in pixels.shape)
                large.append(pixels[r : r + 48, c : c + 48])
        wanted = torch.from_numpy(np.stack(large)).float()[:, None] / 255
        return functional.avg_pool2d(wanted, 3), wanted

    data = Data(
        pairs(options.photographs, (0, 900), 6),
        pairs(options.photographs, (900, 1000), 4),
        pairs(options.heldout, (0, 500), 2),
    )

    def psnr(images: Tensor, wanted: Tensor) -> Tensor:
        return -10 * (images - wanted).square().mean((1, 2, 3)).clamp_min(1e-6).log10().mean()

    return Problem(Upscaler, data, functional.l1_loss, lambda x: x, psnr, "PSNR (dB)", 12)


def make_segmentation(options: Any) -> Problem:
    """Handwritten digits, half transparent on photographs: which pixels are of a digit."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    shapes = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    shapes = functional.interpolate(shapes, scale_factor=4, mode="bilinear")[:, 0] > 0.5

    def scenes(
        file: Path, rows: tuple[int, int], chosen: tuple[int, int], count: int, seed: int
    ) -> Batch:
        rng = np.random.default_rng(seed)
        photographs = [
            torch.from_numpy(np.array(image.convert("RGB").resize((96, 96)))).permute(2, 0, 1)
            for image in read_photographs(file, rows)
        ]
        images, masks = torch.empty(count, 3, 64, 64), torch.zeros(count, 64, 64, dtype=torch.long)
        for index, (image, mask) in enumerate(zip(images, masks, strict=True)):
            r, c = rng.integers(0, 33, 2)
            image[:] = photographs[index % len(photographs)][:, r : r + 64, c : c + 64] / 255
            for digit in rng.integers(*chosen, rng.integers(1, 4)):
                r, c = rng.integers(0, 33, 2)
                window = slice(r, r + 32), slice(c, c + 32)
                color = torch.from_numpy(rng.random((3, 1))).float()
                part = image[:, *window]
                part[:, shapes[digit]] = 0.3 * part[:, shapes[digit]] + 0.7 * color
                mask[*window][shapes[digit]] = 1
        return images * 4 - 2, masks

    data = Data(
        scenes(options.photographs, (0, 900), (0, 1200), 1800, 0),
        scenes(options.photographs, (900, 1000), (1200, 1400), 300, 1),
        scenes(options.heldout, (0, 500), (1400, len(shapes)), 1000, 2),
    )
    weights = torch.tensor([0.3, 1.0])

    def loss(output: dict[str, Tensor], wanted: Tensor) -> Tensor:
        return functional.cross_entropy(output["out"], wanted, weights)

    def answer(output: dict[str, Tensor]) -> Tensor:
        return output["out"].argmax(1)

    return Problem(make_segmenter, data, loss, answer, mean_iou, "mean IoU", 12, 3e-3)


def make_digits(options: Any) -> Problem:
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.data[order]).float()[:, None] / 8 - 1
    y = torch.from_numpy(digits.target[order])
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 1300), (1300, len(y)))]
    return Problem(
        Sequence, Data(*parts), functional.cross_entropy, choose_class, accuracy, "accuracy", 45
    )


def make_siamese(options: Any) -> Problem:
    def crops(file: Path, rows: tuple[int, int], seed: int) -> Batch:
        images = read_images(file, rows)
        rng = np.random.default_rng(seed)
        is_same = torch.from_numpy(rng.integers(0, 2, len(images)))
        others = torch.from_numpy(rng.permutation(len(images)))
        second = torch.where(is_same.bool(), torch.arange(len(images)), others)

        def crop(chosen: Tensor) -> Tensor:
            corners = rng.integers(0, 13, (len(chosen), 2))
            return torch.stack(
                [x[:, r : r + 20, c : c + 20] for x, (r, c) in zip(chosen, corners, strict=True)]
            )

        return crop(images) * 4 - 2, crop(images[second]) * 4 - 2, is_same

    data = Data(
        crops(options.train, (0, 8000), 0),
        crops(options.train, (45000, 46000), 1),
        crops(options.test, (0, 3000), 2),
    )
    return Problem(Siamese, data, functional.cross_entropy, choose_class, accuracy, "accuracy", 12)


PROBLEMS = {
    "super-resolution": make_upscaling, "segmentation": make_segmentation,
    "digits": make_digits, "siamese": make_siamese,
}  # fmt: skip
