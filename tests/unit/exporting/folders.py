"""Subnet folders as a search leaves them, with random keep counts."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cacp_ray.models.factory import build_model
from cacp_ray.pruning.subnet import describe_kept, save_subnet
from cacp_ray.workflows.analyze import analyze
from tests.unit.pruning.networks import Plain

DEPTHWISE = "tests.unit.pruning.networks:Depthwise"
PER_IMAGE = "tests.unit.exporting.folders:PerImage"
BESSEL = "tests.unit.exporting.folders:WithBessel"


class PerImage(Plain):
    """Loops over its images in Python: a tracer sees one batch size only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([super(PerImage, self).forward(image[None]) for image in x])


class Bessel(torch.nn.Module):
    """A function that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.bessel_j0(x)


class WithBessel(Plain):
    """Its second layer has no translation."""

    def __init__(self, num_classes: int = 5) -> None:
        super().__init__(num_classes)
        self.insert(1, Bessel())


def make_folder(folder: Path, name: str, side: int, num_classes: int = 5, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    model = build_model(name, num_classes).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, std=0.1)
    analysis = analyze(model, torch.zeros(1, 3, side, side))
    rng = np.random.default_rng(seed)
    counts = [int(rng.integers(1, group.num_channels + 1)) for group in analysis.groups]
    orders = [np.arange(group.num_channels) for group in analysis.groups]
    description = {
        "model": name,
        "num_classes": num_classes,
        "classes": [f"class {index}" for index in range(num_classes)],
        "input_shape": [3, side, side],
        "cost": "macs",
        "rate": 0.5,
        "cost_kept": 0.4999,
        "macs": int(analysis.cost(counts)),
        "params": int(analysis.plan.params(counts)),
        "groups": describe_kept(analysis.plan, orders, counts),
    }
    save_subnet(folder, analysis.build(counts), description)
    return folder
