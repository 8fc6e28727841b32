"""Curves of a search, for TensorBoard, Weights & Biases and MLflow."""

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
    """Refuses a logger whose package is missing.

    Raises:
        ConfigError: One is not installed.
    """
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(f"logger {name} is not installed: pip install {PACKAGES[name]}")


class ScalarLog:
    """Named numbers by the number of evaluations; opened with the first of them."""

    def __init__(
        self, names: Sequence[Logger], folder: Path, project: str, config: Mapping[str, Any]
    ) -> None:
        """Opens nothing yet.

        Args:
            names: Of the loggers.
            folder: Of the run. TensorBoard's files go there; the ids that Weights & Biases and
                MLflow give the run are kept there, so that a resumed search goes on with them.
            project: Name of the project or experiment.
            config: Shown beside the run.
        """
        self._names, self._folder = names, folder
        self._project, self._config = project, dict(config)
        self._sinks: list[tuple[Log, Close]] | None = None

    def write(self, scalars: Mapping[str, float | None], step: int) -> None:
        """Logs what is known of `scalars`."""
        known = {name: float(value) for name, value in scalars.items() if value is not None}
        if self._sinks is None:
            self._sinks = [OPEN[name](self) for name in self._names]
        for log, _ in self._sinks:
            log(known, step)

    def close(self) -> None:
        """Ends the run at every logger; what is written later opens them again."""
        for _, close in self._sinks or []:
            close()
        self._sinks = None

    def _open_tensorboard(self) -> tuple[Log, Close]:
        from tensorboardX import SummaryWriter  # comes with ray[rllib] and ray[tune]

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
        (self._folder / f"{name}_run").write_text(value + "\n")


OPEN = {
    "tensorboard": ScalarLog._open_tensorboard,
    "wandb": ScalarLog._open_wandb,
    "mlflow": ScalarLog._open_mlflow,
}
