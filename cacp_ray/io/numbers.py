"""Numbers that a user's code returns: plain ones, NumPy's, and tensors of one value."""

# pyright: basic
# Basic: anything may be handed in.

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from cacp_ray.errors import ConfigError


def as_number(what: str, value: Any) -> float:
    """A number as float, which may be infinite or NaN.

    Args:
        what: Begins the message, such as `the task's score`.
        value: What was returned.

    Raises:
        ConfigError: It is no number.
    """
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number and isinstance(value, Tensor | np.ndarray) and math.prod(value.shape) == 1:
        is_number = True
    if not is_number:
        raise ConfigError(
            f"{what} is of type {type(value).__name__}: return one number, or a mapping of numbers "
            "with `score`"
        )
    return float(value.detach() if isinstance(value, Tensor) else value)


def read_numbers(what: str, values: Any) -> dict[str, float]:
    """A mapping of names to finite numbers.

    Raises:
        ConfigError: It is no mapping, or an entry is no finite number.
    """
    if not isinstance(values, Mapping):
        raise ConfigError(
            f"{what} is of type {type(values).__name__}: give a mapping of names to numbers"
        )
    numbers = {str(name): as_number(f"{what}: {name}", value) for name, value in values.items()}
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ConfigError(f"{what}: {name} is {number}: give finite numbers alone")
    return numbers
