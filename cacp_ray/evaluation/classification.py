"""The built-in task: classification of images, judged by top-1."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.evaluation.measurement import TOP1, Scored
from cacp_ray.training.metrics import Accuracy, Split, measure_split


@dataclass(frozen=True)
class Classification:
    """Labelled images; a network returns a score for each class.

    Attributes:
        split: The search split.
    """

    split: ImageSet
    metric = TOP1

    def __len__(self) -> int:
        return len(self.split)

    def measure(self, net: nn.Module) -> Scored:
        """What a network is worth on all images, in float32."""
        return measure_accuracy(net, self.split)

    def describe(self) -> dict[str, Any]:
        """What subnet.json says of the data."""
        split = self.split
        return {
            "num_classes": len(split.classes),
            "classes": list(split.classes),
            "mean": list(split.mean),
            "std": list(split.std),
        }

    def without_data(self) -> "Classification":
        """The same with one image, for a process that measures nothing."""
        return replace(self, split=self.split.at(np.arange(1)))


def as_scored(accuracy: Accuracy) -> Scored:
    """An accuracy with top-1 as the score."""
    figures = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
    return Scored(score=accuracy.top1, figures=figures, images=accuracy.images)


def measure_accuracy(net: nn.Module, split: Split) -> Scored:
    """What a network is worth on a split, in float32."""
    return as_scored(measure_split(net, split))
