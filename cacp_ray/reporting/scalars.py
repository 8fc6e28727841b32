"""Sends the curves of a search to TensorBoard, Weights & Biases and MLflow."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from cacp_ray.errors import ConfigError

Logger = Literal["tensorboard", "wandb", "mlflow"]
Log = Callable[[dict[str, float], int], object]
Close = Callable[[], object]

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}


def check_loggers(names: Sequence[str]) -> None:
    """Checks that the packages of the loggers are installed.

    Raises:
        ConfigError: A package is missing.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"logger {name} is not installed: pip install {PACKAGES[name]}")


class ScalarLog:
    """Logs named numbers by the number of evaluations; the first `write` opens the loggers.

    The run folder gets TensorBoard's files, and the ids of the run at Weights & Biases and MLflow,
    with which a resumed search continues.
    """

    def __init__(
        self, names: Sequence[Logger], folder: Path, project: str, config: Mapping[str, Any]
    ) -> None:
        self._names, self._folder = names, folder
        self._project, self._config = project, dict(config)
        self._sinks: list[tuple[Log, Close]] | None = None

    def write(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Logs the values that are not None."""
        known = {name: float(value) for name, value in scalars.items() if value is not None}
        if self._sinks is None:
            self._sinks = [OPEN[name](self) for name in self._names]
        for log, _ in self._sinks:
            log(known, step)

    def close(self) -> None:
        """Ends the run at every logger; a later `write` opens them again."""
        for _, close in self._sinks or []:
            close()
        self._sinks = None

    def _open_tensorboard(self) -> tuple[Log, Close]:
        from tensorboardX import SummaryWriter  # a dependency of ray[rllib] and ray[tune]

        writer = SummaryWriter(str(self._folder / "tensorboard"))

        def log(scalars: dict[str, float], step: int) -> None:
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log, writer.close

    def _open_wandb(self) -> tuple[Log, Close]:
        import wandb  # pyright: ignore[reportMissingImports]

        run = wandb.init(
            project=self._project,
            name="search",
            id=self._known_id("wandb"),
            resume="allow",
            config=self._config,
            dir=str(self._folder),
        )
        self._keep_id("wandb", run.id)
        return lambda scalars, step: run.log(scalars | {"evaluations": step}), run.finish

    def _open_mlflow(self) -> tuple[Log, Close]:
        import mlflow  # pyright: ignore[reportMissingImports]

        mlflow.set_experiment(self._project)
        known = self._known_id("mlflow")
        run = mlflow.start_run(run_id=known, run_name=None if known else "search")
        if known is None:
            mlflow.log_dict(self._config, "config.yaml")
        self._keep_id("mlflow", run.info.run_id)
        return lambda scalars, step: mlflow.log_metrics(scalars, step=step), mlflow.end_run

    def _known_id(self, name: str) -> str | None:
        file = self._folder / f"{name}_run"
        return file.read_text().strip() if file.exists() else None

    def _keep_id(self, name: str, value: str) -> None:
        (self._folder / f"{name}_run").write_text(value + "\n", encoding="utf-8")


OPEN = {
    "tensorboard": ScalarLog._open_tensorboard,
    "wandb": ScalarLog._open_wandb,
    "mlflow": ScalarLog._open_mlflow,
}
