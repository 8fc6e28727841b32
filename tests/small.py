"""The smallest whole search on real images: what several tests search, fine-tune and resume."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest

from cacp_ray.evaluation.measurement import Measurement

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {
        "train": {"path": "embedded:train", "rows": [0, 400]},
        "search": {"path": "embedded:search", "rows": [0, 300]},
        "test": {"path": "embedded:test", "rows": [0, 200]},
    },
    "rates": [0.4, 0.7],
    "evaluations": 14,
    "mode": "rounds",
    "round_size": 4,
    "pruning": {"calibration_images": 64, "criterion": "l1", "sequential": False},
    "evaluation": {"images": 150, "dtype": "float32"},
    "report": {"frontier": False, "learning": False, "latency": False},
    "finetune": {"epochs": 1, "lr": 0.01, "distillation": 0.5},
}
# Smaller still, where what is tried is the way and not what comes out.
TINY: dict[str, Any] = SMALL | {
    "data": {"search": {"path": "embedded:search", "rows": [0, 150]}},
    "rates": [0.5],
    "strategy": "random",
    "evaluations": 4,
    "round_size": 2,
    "pruning": {"calibration_images": 64, "criterion": "l1", "recovery": "none"},
    "evaluation": {"images": 50, "dtype": "float32"},
}


def mostly_slow(names: Iterable[Any], fast: Collection[Any]) -> list[Any]:
    """Parameters of a test, of which `make test` tries those in `fast`."""
    return [
        n
        if n in fast
        else pytest.param(*(n if isinstance(n, tuple) else [n]), marks=pytest.mark.slow)
        for n in names
    ]


def measurement_of(index, score, top5=0.0, loss=0.0, images=1, seconds=0.0, status="ok", **others):
    """A measurement of the built-in task."""
    figures = {"top1": score, "top5": top5, "loss": loss}
    return Measurement(
        index=index, score=score, figures=figures, images=images, seconds=seconds, status=status,
        **others,
    )  # fmt: skip
