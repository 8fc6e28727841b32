"""Large values in Ray's object store, once on a machine, instead of in the driver too."""

from typing import TypeVar

import ray

T = TypeVar("T")


def share(value: T) -> tuple[ray.ObjectRef, T]:
    """Stores a value.

    Returns:
        The reference, which evaluators take, and the value as the store has it: its numpy arrays
        are read there without a copy, and read-only, as long as Ray is connected.
    """
    ref = ray.put(value)
    return ref, ray.get(ref)
