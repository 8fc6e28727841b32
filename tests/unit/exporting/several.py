"""Small networks with several inputs and outputs, and what files call them."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree


class Segmenter(nn.Module):
    """One image in, a dictionary out, as torchvision's networks for segmentation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)
        self.out, self.aux = nn.Conv2d(6, 2, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> Any:
        y = self.first(x).relu()
        return OrderedDict(out=self.out(self.second(y).relu()), aux=self.aux(y).argmax(1))


class Siamese(nn.Module):
    """Two images of unequal sides in, one tensor out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 6, 3, padding=1)

    def embed(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu()).mean((2, 3))

    def forward(self, left: Tensor, right: Tensor) -> Any:
        return (self.embed(left) - self.embed(right)).square().sum(1)


class Nested(Siamese):
    """A nested tuple out, with a tensor twice and an entry that is none."""

    def forward(self, *images: Tensor) -> Any:
        left, right = map(self.embed, images)
        return left, {"boxes": [right, left * right], "again": left, "nothing": None}


class Tokens(Siamese):
    """An image and words, by names in another order; outputs with names of inner values."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(5, 6)

    def forward(self, image: Tensor, tokens: Tensor, scale: Tensor) -> Any:
        y = self.embed(image) + self.words(tokens).mean(1) * scale[:, None]
        return {"image": y, "conv2d": y.relu(), "seen": tokens + 1}


class Table(Siamese):
    """A table of four rows for all images: the first dimensions are no batch."""

    def forward(self, image: Tensor, table: Tensor) -> Any:
        return self.embed(image) @ table.T


class HubOutput(OrderedDict):
    """A class that is registered without names of its parts."""


_pytree.register_pytree_node(
    HubOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, keys: HubOutput(zip(keys, values, strict=True)),
    serialized_type_name=f"{__name__}.HubOutput",
)


class Hub(Segmenter):
    """Such a class out."""

    def forward(self, x: Tensor) -> Any:
        return HubOutput(super().forward(x))


@dataclass
class Pair:
    """A dataclass that is registered."""

    out: Tensor
    more: list[Tensor]


torch.export.register_dataclass(Pair, serialized_type_name=f"{__name__}.Pair")


@dataclass
class Unknown:
    """A dataclass that is not."""

    out: Tensor


class Dataclasses(Segmenter):
    """A dataclass out."""

    def __init__(self, kind: type = Pair) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Any:
        out, aux = super().forward(x).values()
        return Pair(out, [aux]) if self.kind is Pair else Unknown(out)


def image(side: int = 8) -> Tensor:
    return torch.zeros(1, 3, side, side)


TOKENS = {
    "tokens": torch.zeros(1, 7, dtype=torch.int64),
    "image": image(),
    "scale": torch.zeros(1, dtype=torch.float64),
}
# Network, example inputs, names of inputs and outputs in ONNX.
CASES: dict[str, tuple[type[nn.Module], Any, list[str], list[str]]] = {
    "dictionary": (Segmenter, image(), ["image"], ["out", "aux"]),
    "two images": (Siamese, (image(), image(6)), ["left", "right"], ["logits"]),
    "nested": (
        Nested,
        (image(), image(6)),
        ["images.0", "images.1"],
        ["0", "1.boxes.0", "1.boxes.1", "1.again"],
    ),
    "by name": (Tokens, TOKENS, ["tokens", "image", "scale"], ["image_out", "conv2d", "seen"]),
    "no batch": (Table, (image(), torch.zeros(4, 6)), ["image", "table"], ["logits"]),
    "hub": (Hub, image(), ["image"], ["out", "aux"]),
    "dataclass": (Dataclasses, image(), ["image"], ["out", "more.0"]),
}
