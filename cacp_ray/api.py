"""What a Python user calls and the command line calls too: the one place that wires objects."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cacp_ray.analysis import Analysis, analyze
from cacp_ray.config import RunConfig, TrainConfig, changed_keys, load_config, resolved
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.exporting.subnet import export_subnet as export
from cacp_ray.files import describe_environment, write_json, write_yaml
from cacp_ray.loading import check_splits, load_base, load_model, read_split
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.results import answer_rates, finetune_run, read_result, report_run
from cacp_ray.run import describe_base, run_search
from cacp_ray.searching.loop import SearchProgress
from cacp_ray.training.base import train_base
from cacp_ray.training.loop import EpochResult
from cacp_ray.training.recipe import Recipe

logger = logging.getLogger(__name__)

__all__ = [
    "Analysis",
    "Run",
    "analyze",
    "export",
    "finetune",
    "load_subnet",
    "search",
    "train_model",
]


def train_model(
    config: TrainConfig,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[EpochResult, float], None] | None = None,
) -> dict[str, Any]:
    """Trains a base network; `cacp_ray.training.base` says what the folder holds.

    Raises:
        CacpError: Bad input, in one line, before anything is written.
    """
    open_folder(run_dir, resolved(config), resume=resume)
    splits = {name: read_split(config.data, name) for name in ("train", "search", "test")}
    check_splits(splits)
    torch.manual_seed(config.training.seed)
    model = load_model(config.model, len(splits["train"].classes))
    write_yaml(run_dir / "config.yaml", resolved(config))
    write_json(run_dir / "environment.json", describe_environment(config.training.seed))
    return train_base(
        model,
        splits["train"].tensors(),
        splits["search"].tensors(),
        splits["test"].tensors(),
        config.training,
        run_dir,
        on_epoch=on_epoch,
    )


def open_folder(run_dir: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Refuses to write over another run, or to continue one under a changed configuration.

    Raises:
        ArtifactError: It exists and `resume` is off, or there is nothing to resume.
        ConfigError: It was started with another configuration; the message names the keys.
    """
    saved = run_dir / "config.yaml"
    if not resume:
        if run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir())):
            raise ArtifactError(
                f"{run_dir} exists: pass --resume to continue it, or choose another --run-dir"
            )
        return
    if not saved.exists():
        raise ArtifactError(f"{run_dir} holds no run (no config.yaml): start it without --resume")
    kind = TrainConfig if "training" in config else RunConfig
    changed = changed_keys(resolved(load_config(kind, saved)), config)
    if changed:
        raise ConfigError(
            f"{run_dir} was started with another configuration; changed: {', '.join(changed)}; "
            "undo the change or choose another --run-dir"
        )


def read_run_config(run_dir: Path) -> RunConfig:
    """The configuration that a run was started with.

    Raises:
        ArtifactError: The folder holds no run.
    """
    if not (run_dir / "config.yaml").exists():
        raise ArtifactError(f"{run_dir} holds no run (no config.yaml): check the path")
    return load_config(RunConfig, run_dir / "config.yaml")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        path: Its directory.
        result: The content of result.json.
    """

    path: Path
    result: dict[str, Any]

    @property
    def subnets(self) -> dict[float, Path]:
        """Subnet folder of every rate; `load_subnet` reads one."""
        return {row["rate"]: self.path / row["path"] for row in self.result["rates"]}

    def policy(self, rate: float, evaluations: int = 0) -> dict[str, Any]:
        """The policy's subnet for any rate; see `cacp_ray.results.answer_rates`."""
        config = read_run_config(self.path)
        return answer_rates(config, self.path, [rate], evaluations, save=False)[0]

    def report(self) -> Path:
        """Writes report.html."""
        return report_run(self.path)


def search(
    config: RunConfig | dict[str, Any] | str | Path,
    run_dir: str | Path | None = None,
    *,
    resume: bool = False,
    address: str | None = None,
    on_progress: Callable[[SearchProgress], object] | None = None,
) -> Run:
    """Searches a smaller network for every rate at once.

    Args:
        config: A configuration, its content, or the path of its YAML file.
        run_dir: Default: runs/NAME.
        resume: Go on with what `run_dir` holds.
        address: Of a Ray cluster; None takes RAY_ADDRESS, else starts a local Ray.
        on_progress: Called while the search goes on.

    Raises:
        CacpError: Bad input, before anything is written, or a failed run.
    """
    settings = config if isinstance(config, RunConfig) else load_config(RunConfig, config)
    folder = Path(run_dir) if run_dir is not None else Path("runs") / settings.name
    open_folder(folder, resolved(settings), resume=resume)
    if (folder / "result.json").exists():
        return Run(folder, read_result(folder))  # finished before: fine-tuning may have added to it
    result = run_search(settings, folder, address=address, on_progress=on_progress, say=logger.info)
    return Run(folder, result)


def check_search(config: RunConfig, run_dir: Path, *, resume: bool = False) -> str:
    """Does all that a search does before it writes anything; one line about what it would search.

    Raises:
        CacpError: The first thing that does not fit.
    """
    open_folder(run_dir, resolved(config), resume=resume)
    return f"{describe_base(load_base(config), config)}; {config.evaluations} evaluations"


def finetune(
    run_dir: str | Path,
    *,
    resume: bool = False,
    address: str | None = None,
    recipe: Recipe | None = None,
    on_epoch: Callable[[Any], None] | None = None,
) -> Run:
    """Fine-tunes the subnets of a finished search, all rates side by side.

    Args:
        run_dir: Of the search.
        resume: Go on with an interrupted fine-tuning.
        address: Of a Ray cluster.
        recipe: Instead of the run's own `finetune` section.
        on_epoch: Called with every finished epoch.
    """
    folder = Path(run_dir)
    config = read_run_config(folder)
    if recipe is not None:
        config = config.model_copy(update={"finetune": recipe})
    listen = on_epoch or (lambda progress: None)
    result = finetune_run(config, folder, resume=resume, address=address, on_epoch=listen)
    return Run(folder, result)
