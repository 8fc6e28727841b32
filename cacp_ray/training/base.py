"""Trains a base network into a folder, and goes on from its last finished epoch after a kill.

The folder holds config.yaml, environment.json, progress.jsonl (one line an epoch), state.pt (to go
on from; read with `weights_only`), and at the end model.safetensors and result.json.
"""

import dataclasses
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ArtifactError
from cacp_ray.files import write_file, write_json, write_tensors
from cacp_ray.training.loop import EpochResult, make_batches, train
from cacp_ray.training.metrics import Accuracy, Split, fast_dtype, measure_split
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)


def train_base(
    model: nn.Module,
    train_split: ImageSet | ImageStream,
    search_split: Split,
    test_split: Split,
    recipe: Recipe,
    folder: Path,
    *,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains, measures the test split once at the end, and writes weights and result.

    Args:
        model: With fresh weights, already seeded; where it lies, it is trained.
        train_split: Images to learn from.
        search_split: Measured after each epoch; it chooses nothing, the last epoch is kept.
        test_split: Measured once.
        recipe: Schedule.
        folder: Where everything is written; a `state.pt` in it is continued.
        on_epoch: Called with each epoch's result and its seconds.
    """
    state_file = folder / "state.pt"
    state = read_state(state_file)
    started = time.monotonic()

    def finish_epoch(result: EpochResult, state: dict[str, Any]) -> None:
        nonlocal started
        seconds = time.monotonic() - started
        write_file(state_file, lambda path: torch.save(state, path))
        row = {"epoch": result.epoch, "train_loss": result.train_loss, "seconds": seconds}
        with (folder / "progress.jsonl").open("a") as log:
            log.write(json.dumps(row | dataclasses.asdict(result.search)) + "\n")
        if on_epoch is not None:
            on_epoch(result, seconds)
        started = time.monotonic()

    batches = make_batches(train_split, recipe)
    train(model, batches, search_split, recipe, state=state, on_epoch=finish_epoch)
    write_tensors(folder / "model.safetensors", model.state_dict())
    # The accuracies of the table are float32: bf16 is for speed.
    accuracies = {
        "search": measure_split(model, search_split),
        "test": measure_split(model, test_split),
        "test_bf16": measure_split(model, test_split, dtype=fast_dtype()),
    }
    result = {"epochs": recipe.epochs} | {k: _rounded(v) for k, v in accuracies.items()}
    write_json(folder / "result.json", result)
    return result


def read_state(file: Path) -> dict[str, Any] | None:
    """The state of the last finished epoch, None where there is none."""
    if not file.exists():
        return None
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken file
        raise ArtifactError(f"{file}: not a readable state; delete it to start again") from error


def _rounded(accuracy: Accuracy) -> dict[str, float]:
    return {key: round(value, 5) for key, value in dataclasses.asdict(accuracy).items()}
