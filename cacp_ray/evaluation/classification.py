"""The built-in task: classification of images, judged by top-1."""

from torch import nn

from cacp_ray.evaluation.measurement import Scored
from cacp_ray.training.metrics import Accuracy, Split, measure_split


def as_scored(accuracy: Accuracy) -> Scored:
    """An accuracy with top-1 as the score."""
    figures = {"top1": accuracy.top1, "top5": accuracy.top5, "loss": accuracy.loss}
    return Scored(score=accuracy.top1, figures=figures, images=accuracy.images)


def measure_accuracy(net: nn.Module, split: Split) -> Scored:
    """What a network is worth on a split, in float32."""
    return as_scored(measure_split(net, split))
