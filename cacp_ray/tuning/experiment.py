"""What experiments of Ray Tune share: silence, loggers, and how a failed trial is told."""

import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback

from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError

# A trial may die this often and is restarted from its last epoch.
MAX_FAILURES = 2
LOGGERS = {"tensorboard": TBXLoggerCallback, "csv": CSVLoggerCallback, "json": JsonLoggerCallback}

# Read by Tune while `fit` runs, in this process and (the first) in the trials.
TUNE_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a trial
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C raises KeyboardInterrupt as anywhere else
    # Saved often, the experiment stays in line with the checkpoints on disk; a save takes 9 ms.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def make_loggers(names: Sequence[str], project: str) -> list[tune.Callback]:
    """Callbacks of Tune that log every epoch of every trial.

    Args:
        names: `tensorboard`, `csv`, `json` (beside each trial), `wandb`, `mlflow`.
        project: What the last two file it under; MLflow takes its tracking server from
            MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: One is not installed.
    """
    found: list[tune.Callback] = []
    for name in names:
        try:
            if name == "wandb":
                from ray.air.integrations.wandb import WandbLoggerCallback

                import_module("wandb")
                found.append(WandbLoggerCallback(project=project))
            elif name == "mlflow":
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                import_module("mlflow")
                found.append(MLflowLoggerCallback(experiment_name=project))
            else:
                found.append(LOGGERS[name]())
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"logger {name} is not installed: pip install {name}") from error
    return found


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Tune neither prints nor changes folders; its errors reach the caller as exceptions."""
    before = {key: os.environ.get(key) for key in TUNE_ENVIRONMENT}
    tune_logger = logging.getLogger("ray.tune")
    level = tune_logger.level
    os.environ.update(TUNE_ENVIRONMENT)
    tune_logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.tune")  # advice on how to call it
            yield
    finally:
        tune_logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def can_restore(folder: Path) -> bool:
    """Whether an experiment is there to go on with; one killed before its first save left none."""
    has_state = any(folder.glob("experiment_state-*.json"))
    return has_state and tune.Tuner.can_restore(str(folder))


def restore(folder: Path, trainable: Any, space: dict[str, Any]) -> tune.Tuner:
    """An experiment to go on with, its failed trials too.

    Raises:
        ArtifactError: Its files are damaged.
    """
    try:
        tuner = tune.Tuner.restore(
            str(folder),
            trainable=trainable,
            param_space=space,
            resume_unfinished=True,
            resume_errored=True,
        )
        tuner.get_results()
    except Exception as error:  # whatever a damaged pickle makes it raise
        raise ArtifactError(
            f"{folder} is damaged ({type(error).__name__}): remove it, and --resume begins these "
            "trials anew"
        ) from error
    return tuner


def check_trials(results: Any, what: str) -> None:
    """Names the first of Tune's results whose trial failed for good.

    Args:
        results: Of `Tuner.fit`.
        what: Stands before the trial's name.

    Raises:
        EvaluationError: With the trial's reason.
    """
    for result in results:
        if result.error is not None:
            reason = (str(result.error).strip().splitlines() or [type(result.error).__name__])[-1]
            raise EvaluationError(
                f"{what} {Path(result.path).name} failed {MAX_FAILURES + 1} times ({reason}); see "
                f"{result.path}, then continue with --resume"
            )
