"""Settings of a training schedule; no torch here, so that reading a configuration stays fast."""

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le
from pydantic import ConfigDict


@dataclass(frozen=True)
class Recipe:
    """SGD with Nesterov momentum, linear warm-up, then cosine to zero, stepped every batch.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images a step.
        lr: Peak learning rate.
        warmup: Share of all steps over which the rate rises linearly.
        momentum: Nesterov momentum.
        weight_decay: On weights of two and more dimensions only.
        label_smoothing: Of the cross-entropy.
        distillation: Weight of the base model's soft labels against the true ones, in [0, 1].
        temperature: Of the distillation (Hinton et al., 2015).
        clip_norm: Largest gradient norm, 0 for none.
        padding: Pixels of the random crop.
        seed: Of order, crops and flips.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    epochs: Annotated[int, Ge(1)] = 24
    batch_size: Annotated[int, Ge(1)] = 128
    lr: Annotated[float, Gt(0)] = 0.25
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2
    momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.05
    distillation: Annotated[float, Ge(0), Le(1)] = 0.0
    temperature: Annotated[float, Gt(0)] = 2.0
    clip_norm: Annotated[float, Ge(0)] = 0.0
    padding: Annotated[int, Ge(0)] = 4
    seed: int = 0
