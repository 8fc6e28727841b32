"""Training of a base network into a folder, resumed from the last finished epoch after a kill.

The folder holds config.yaml, environment.json, progress.jsonl (one line for each epoch), state.pt
(the state to resume from), and at the end model.safetensors and result.json.
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

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import write_file, write_json, write_tensors
from cacp_ray.io.jsonl import append_line
from cacp_ray.training.loop import EpochResult, make_batches, train
from cacp_ray.training.metrics import Split, fast_dtype, measure_split
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)


def train_base(
    model: nn.Module,
    train_split: Split,
    search_split: Split,
    test_split: Split,
    recipe: Recipe,
    folder: Path,
    *,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains, measures the test split once at the end, and writes weights and result.

    The network has fresh, seeded weights, and is trained in place on its device. The search split
    is measured after each epoch and chooses nothing: the last epoch is kept. `on_epoch` is called
    with each epoch's result and its seconds.

    Raises:
        ArtifactError: `state.pt` cannot be read.
    """
    state_file = folder / "state.pt"
    state = read_state(state_file)
    started = time.monotonic()

    def finish_epoch(result: EpochResult, state: dict[str, Any]) -> None:
        nonlocal started
        seconds = time.monotonic() - started
        write_file(state_file, lambda path: torch.save(state, path))
        row = {"epoch": result.epoch, "train_loss": result.train_loss, "seconds": seconds}
        row |= dataclasses.asdict(result.search)
        append_line(folder / "progress.jsonl", json.dumps(row))
        if on_epoch is not None:
            on_epoch(result, seconds)
        started = time.monotonic()

    batches = make_batches(train_split, recipe)
    train(model, batches, search_split, recipe, state=state, on_epoch=finish_epoch)
    write_tensors(folder / "model.safetensors", model.state_dict())
    # The reported accuracies are float32; bfloat16 shows what speed costs.
    accuracies = {
        "search": measure_split(model, search_split),
        "test": measure_split(model, test_split),
        "test_bf16": measure_split(model, test_split, dtype=fast_dtype()),
    }
    result: dict[str, Any] = {"epochs": recipe.epochs}
    for name, accuracy in accuracies.items():
        values = dataclasses.asdict(accuracy)
        result[name] = {key: round(value, 5) for key, value in values.items()}
    write_json(folder / "result.json", result)
    return result


def read_state(file: Path) -> dict[str, Any] | None:
    """State of the last finished epoch; None where there is none.

    Raises:
        ArtifactError: The file cannot be read.
    """
    if not file.exists():
        return None
    try:
        return torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken file
        raise ArtifactError(f"{file}: not a readable state; delete it to start again") from error
