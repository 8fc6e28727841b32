"""What a Python user calls and the command line calls too: the one place that wires objects."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from cacp_ray.config import DataConfig, TrainConfig, changed_keys, resolved
from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.data.transforms import to_normalized
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.files import describe_environment, write_json, write_yaml
from cacp_ray.models.factory import build_model, load_weights
from cacp_ray.training.base import train_base
from cacp_ray.training.loop import EpochResult

logger = logging.getLogger(__name__)


def read_splits(data: DataConfig, *names: str) -> list[ImageSet]:
    """Decodes the named splits, which must have the same classes and image size."""
    splits = []
    for name in names:
        split = getattr(data, name)
        splits.append(read_parquet(split.path, split.rows))
    for name, split in zip(names, splits, strict=True):
        first = splits[0]
        if split.classes != first.classes or split.images.shape[1:] != first.images.shape[1:]:
            raise ConfigError(
                f"data.{name}: {len(split.classes)} classes of {split.images.shape[1:]} images, but "
                f"data.{names[0]} has {len(first.classes)} of {first.images.shape[1:]}"
            )
    return splits


def as_tensors(split: ImageSet) -> tuple[Tensor, Tensor]:
    """Normalised images (N, C, H, W) and labels (N,)."""
    return to_normalized(split.images), torch.from_numpy(split.labels)


def train_model(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a base network; see `cacp_ray.training.base` for what the folder holds."""
    open_folder(run_dir, resolved(config), resume=resume)
    train_set, search_set, test_set = read_splits(config.data, "train", "search", "test")
    torch.manual_seed(config.training.seed)
    model = build_model(config.model.name, len(train_set.classes))
    if config.model.weights:
        load_weights(model, config.model.weights)
    write_yaml(run_dir / "config.yaml", resolved(config))
    write_json(run_dir / "environment.json", describe_environment(config.training.seed))
    splits = (as_tensors(train_set), as_tensors(search_set), as_tensors(test_set))
    return train_base(model, *splits, config.training, run_dir, on_epoch=on_epoch)


def open_folder(run_dir: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Refuses to write over another run, or to continue one under a changed configuration."""
    saved = run_dir / "config.yaml"
    if not resume:
        if run_dir.exists() and any(run_dir.iterdir()):
            raise ArtifactError(
                f"{run_dir} exists: pass --resume to continue it, or choose another --run-dir"
            )
        return
    if not saved.exists():
        raise ArtifactError(f"{run_dir} holds no run (no config.yaml): start it without --resume")
    changed = changed_keys(yaml.safe_load(saved.read_text()), config)
    if changed:
        raise ConfigError(
            f"{run_dir} was started with another configuration; changed: {', '.join(changed)}; "
            "undo the change or choose another --run-dir"
        )
