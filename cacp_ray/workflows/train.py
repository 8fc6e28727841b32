"""Training of a base network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cacp_ray.config.reading import resolved
from cacp_ray.config.run import TrainConfig
from cacp_ray.config.saved import open_folder
from cacp_ray.io.environment import describe_environment
from cacp_ray.io.files import write_json, write_yaml
from cacp_ray.training.base import train_base
from cacp_ray.training.loop import EpochResult
from cacp_ray.workflows.network import check_channels, load_model
from cacp_ray.workflows.splits import Splits, check_padding, check_splits


def train_model(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a base network, on a GPU where there is one.

    `cacp_ray.training.base` says what the folder holds.

    Raises:
        CacpError: Bad input, in one line, before anything is written.
    """
    open_folder(run_dir, config, resume=resume)
    splits = Splits(config.data)
    train, search, test = splits.open("train"), splits.read("search"), splits.open("test")
    check_splits({"train": train, "search": search, "test": test})
    check_padding(config.training, search, "training.padding")
    torch.manual_seed(config.training.seed)
    model = load_model(config.model, len(train.classes))
    check_channels(model, search.take(1).tensors()[0])
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    write_yaml(run_dir / "config.yaml", resolved(config))
    write_json(run_dir / "environment.json", describe_environment(config.training.seed))
    return train_base(
        model,
        train,
        search,
        test,
        config.training,
        run_dir,
        on_epoch=on_epoch,
    )
