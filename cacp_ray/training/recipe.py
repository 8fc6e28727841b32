"""Settings of a training schedule; no torch here, so that reading a configuration stays fast."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BeforeValidator, ConfigDict

Order = Literal["ladder", "parallel"]


def _check_rate(value: Any) -> Any:
    if value == "auto":
        return value
    try:  # YAML takes 1e-3 for a text
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:
        raise ValueError("write a finite number above 0, or auto")
    return number


Rate = Annotated[float | Literal["auto"], BeforeValidator(_check_rate)]


@dataclass(frozen=True)
class Recipe:
    """Training with a learning rate that warms up linearly, then falls as a cosine to zero.

    Attributes:
        epochs: Passes over the training images.
        optimizer: `sgd` with Nesterov momentum, or `adamw` (Loshchilov and Hutter, 2019).
        batch_size: Images in a step.
        lr: Peak learning rate; `auto` takes what the network bears (training/curvature.py).
        warmup: Share of all steps over which the rate rises linearly.
        momentum: Nesterov momentum of `sgd`.
        weight_decay: Weight decay of tensors with two or more dimensions; others have none.
        label_smoothing: Label smoothing of the cross-entropy, in [0, 1].
        distillation: Weight of the teacher's soft labels against the true ones, in [0, 1].
        teacher: `base` network, or the fine-tuned subnet of the next `larger` rate.
        order: `ladder` trains the largest rate first and cuts each smaller subnet from the next
            larger trained one; `parallel` trains all as the search left them.
        temperature: Temperature of the distillation (Hinton et al., 2015).
        clip_norm: Largest gradient norm; 0 for no clipping.
        ema: Decay of the weight average, which is measured and kept; 0 for no average.
        mixup: Both parameters of the Beta distribution by which images are mixed (Zhang et al.,
            2018); 0 for no mixing.
        erasing: Share of images that lose a rectangle (Zhong et al., 2020).
        padding: Pixels added on each side before the random crop.
        seed: Seed of image order and augmentation.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    epochs: Annotated[int, Ge(1)] = 24
    optimizer: Literal["sgd", "adamw"] = "sgd"
    batch_size: Annotated[int, Ge(1)] = 128
    lr: Rate = 0.25
    warmup: Annotated[float, Ge(0), Le(1)] = 0.2
    momentum: Annotated[float, Ge(0), Le(1)] = 0.9
    weight_decay: Annotated[float, Ge(0)] = 5e-4
    label_smoothing: Annotated[float, Ge(0), Le(1)] = 0.05
    distillation: Annotated[float, Ge(0), Le(1)] = 0.0
    teacher: Literal["base", "larger"] = "base"
    order: Order = "parallel"
    temperature: Annotated[float, Gt(0)] = 2.0
    clip_norm: Annotated[float, Ge(0)] = 0.0
    ema: Annotated[float, Ge(0), Lt(1)] = 0.0
    mixup: Annotated[float, Ge(0)] = 0.0
    erasing: Annotated[float, Ge(0), Le(1)] = 0.0
    padding: Annotated[int, Ge(0)] = 4
    seed: Annotated[int, Ge(0)] = 0

    def __post_init__(self) -> None:
        if self.lr == "auto" and self.optimizer != "sgd":
            raise ValueError(f"lr: auto is for sgd; give {self.optimizer} a number")

    @property
    def peak(self) -> float:
        """The peak learning rate, once it is known."""
        assert not isinstance(self.lr, str), "`train` finds it first"
        return self.lr
