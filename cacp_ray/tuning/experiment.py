"""What experiments of Ray Tune share: silence, loggers, reports, and errors of failed trials."""

import builtins
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs
from ray import tune
from ray.exceptions import RayError
from ray.tune import TuneError
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback, TBXLoggerCallback

from cacp_ray.distributed.cluster import environment
from cacp_ray.distributed.tasks import describe
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError, one_line
from cacp_ray.io.files import changed_keys
from cacp_ray.io.labels import Selector

# A trial is restarted this often from its last checkpoint.
MAX_FAILURES = 2
SETTINGS_FILE = "finetune.json"  # what an experiment tries
LOGGERS = {"tensorboard": TBXLoggerCallback, "csv": CSVLoggerCallback, "json": JsonLoggerCallback}

# Tune reads these while `fit` runs; trials read the first too.
TUNE_ENVIRONMENT = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean the same in a trial
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # Ctrl-C raises KeyboardInterrupt
    # Frequent saves keep the experiment in line with its checkpoints; a save takes 9 ms.
    "TUNE_GLOBAL_CHECKPOINT_S": "1",
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}


def make_loggers(names: Sequence[str], project: str) -> list[tune.Callback]:
    """Makes callbacks of Tune that log every epoch of every trial.

    `tensorboard`, `csv` and `json` write to the folder of each trial. `project` names the project
    in W&B, or the experiment in MLflow, whose tracking server is MLFLOW_TRACKING_URI.

    Raises:
        ConfigError: A logger is not installed.
    """
    loggers: list[tune.Callback] = []
    for name in names:
        try:
            if name == "wandb":
                from ray.air.integrations.wandb import WandbLoggerCallback

                import_module("wandb")
                loggers.append(WandbLoggerCallback(project=project))
            elif name == "mlflow":
                from ray.air.integrations.mlflow import MLflowLoggerCallback

                import_module("mlflow")
                loggers.append(MLflowLoggerCallback(experiment_name=project))
            else:
                loggers.append(LOGGERS[name]())
        except (ImportError, RuntimeError) as error:
            raise ConfigError(f"logger {name} is not installed: pip install {name}") from error
    return loggers


# Tune pickles callbacks with an experiment and restores those of the former driver. The listener
# belongs to this driver, so it is kept outside of them.
_listener: ContextVar[Callable[[Trial, dict[str, Any]], object]] = ContextVar("_listener")


class ReportCallback(tune.Callback):
    """Hands every report of a trial to the listener of `running_tune`."""

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune in the driver."""
        _listener.get()(trial, result)


@contextmanager
def running_tune(
    listener: Callable[[Trial, dict[str, Any]], object], files: "TrialFiles"
) -> Iterator[None]:
    """Has Tune neither print nor change folders; the listener takes each trial's metrics.

    What the listener raises reaches the caller; Tune would make a text of it.

    Raises:
        ArtifactError: The storage of the trials failed.
        EvaluationError: Tune has stopped for another reason.
    """
    raised: list[Exception] = []

    def listen(trial: Trial, metrics: dict[str, Any]) -> None:
        try:
            listener(trial, metrics)
        except Exception as error:
            raised.append(error)
            raise

    token = _listener.set(listen)
    tune_logger = logging.getLogger("ray.tune")
    level = tune_logger.level
    tune_logger.setLevel(logging.CRITICAL)
    try:
        with environment(TUNE_ENVIRONMENT), warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"ray\.tune")  # advice on how to call it
            with files.reached():
                yield
    except Exception as error:
        if raised:
            raise raised[0] from error
        raise
    finally:
        _listener.reset(token)
        tune_logger.setLevel(level)


@dataclass(frozen=True)
class TrialFiles:
    """Where Tune keeps an experiment and the checkpoints of its trials.

    Attributes:
        path: Absolute folder, or BUCKET/FOLDER of an object store.
        filesystem: The object store; None for a folder that all nodes share.
    """

    path: str
    filesystem: fs.FileSystem | None = None

    @contextmanager
    def reached(self) -> Iterator[None]:
        """Has errors of Tune reach the caller in one line.

        Raises:
            ArtifactError: The storage failed.
            EvaluationError: Something else did.
        """
        try:
            yield
        except (OSError, pa.ArrowException, TuneError) as error:
            # Tune makes a text of what is raised while it takes in a report.
            reason = _describe(error)
            if isinstance(error, TuneError) and not _is_of_files(reason):
                raise EvaluationError(
                    f"{self.path}: Ray Tune has stopped ({reason}): go on with --resume, in Python "
                    "resume=True"
                ) from error
            raise ArtifactError(
                f"storage: {self.path} cannot be read or written by Ray Tune ({reason}): make room "
                "or check its permissions, then go on with --resume, in Python resume=True"
            ) from error

    def can_restore(self) -> bool:
        """Whether an experiment is there; one killed before its first save left none."""
        place = self.filesystem or fs.LocalFileSystem()
        selector = fs.FileSelector(self.path, allow_not_found=True)
        names = [info.base_name for info in place.get_file_info(selector)]
        has_state = any(
            name.startswith("experiment_state-") and name.endswith(".json") for name in names
        )
        return has_state and tune.Tuner.can_restore(self.path, self.filesystem)

    def note(self, content: Mapping[str, Any], *, resume: bool) -> None:
        """Writes beside the trials of an object store what they try, or compares it.

        Raises:
            ArtifactError: Trials are there and `resume` is off, or the store cannot be read.
            ConfigError: They try something else.
        """
        assert self.filesystem is not None
        file = f"{self.path}/{SETTINGS_FILE}"
        try:
            is_there = self.filesystem.get_file_info(file).type == fs.FileType.File
            if is_there:
                with self.filesystem.open_input_stream(file) as stream:
                    saved = json.loads(stream.read())
            else:
                if isinstance(self.filesystem, fs.LocalFileSystem):
                    self.filesystem.create_dir(self.path, recursive=True)
                with self.filesystem.open_output_stream(file) as stream:
                    stream.write(json.dumps(content).encode())
                return
        except (OSError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(
                f"storage: {self.path} cannot be read or written ({one_line(error)}): check its "
                "permissions, or try again"
            ) from error
        if not resume:
            raise ArtifactError(
                f"storage: {self.path} holds trials of a fine-tuning: pass --resume (in Python "
                "resume=True) to continue it, or delete them"
            )
        if saved != json.loads(json.dumps(content)):
            changed = ", ".join(changed_keys(saved, dict(content)))
            raise ConfigError(
                f"storage: {self.path} holds trials of other settings ({changed}): undo the change,"
                " or delete them to fine-tune again"
            )


def as_resources(cpus: float, gpus: float, labels: Selector) -> Any:
    """What a trial reserves, for `tune.with_resources`, on nodes with these labels."""
    if not labels:
        return {"cpu": cpus, **({"gpu": gpus} if gpus else {})}
    bundle = {"CPU": cpus, **({"GPU": gpus} if gpus else {})}
    return tune.PlacementGroupFactory([bundle], bundle_label_selector=[dict(labels)])


def make_run_config(
    files: TrialFiles, callbacks: list[tune.Callback], num_checkpoints: int | None
) -> tune.RunConfig:
    """An experiment; trials that die go on from their last checkpoint."""
    parent, _, name = files.path.rpartition("/")
    return tune.RunConfig(
        name=name,
        storage_path=parent,
        storage_filesystem=files.filesystem,
        verbose=0,
        callbacks=callbacks,
        failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
        checkpoint_config=tune.CheckpointConfig(num_to_keep=num_checkpoints),
    )


def restore(files: TrialFiles, trainable: Any, space: dict[str, Any]) -> tune.Tuner:
    """Restores an experiment; unfinished and failed trials go on.

    Raises:
        ArtifactError: Its files are damaged, or cannot be read.
    """
    try:
        tuner = tune.Tuner.restore(
            files.path,
            trainable=trainable,
            storage_filesystem=files.filesystem,
            param_space=space,
            resume_unfinished=True,
            resume_errored=True,
        )
        tuner.get_results()
    except Exception as error:  # a damaged pickle raises anything
        fails = isinstance(error, OSError | pa.ArrowException)
        if fails and not isinstance(error, FileNotFoundError):
            raise  # `TrialFiles.reached` tells of it
        raise ArtifactError(
            f"{files.path} is damaged ({type(error).__name__}): remove it, and --resume (in Python "
            "resume=True) begins these trials anew"
        ) from error
    return tuner


def check_trials(results: Any, what: str) -> None:
    """Checks the results of `Tuner.fit`; `what` stands before a trial's name in the message.

    Raises:
        EvaluationError: A trial failed for good; the message gives the reason.
    """
    for result in results:
        if result.error is not None:
            raise EvaluationError(
                f"{what} {Path(result.path).name} failed {MAX_FAILURES + 1} times "
                f"({_describe(result.error)}); see {result.path}, then continue with --resume, in "
                "Python resume=True"
            )


def _is_of_files(reason: str) -> bool:
    """Whether the text of an error, which begins with its type, is that of a file system's."""
    name = reason.partition(":")[0].rpartition(".")[2]
    kind = getattr(builtins, name, None)
    return name.startswith("Arrow") or (isinstance(kind, type) and issubclass(kind, OSError))


def _describe(error: Exception) -> str:
    """Name of the error and the first line of its message."""
    if isinstance(error, RayError):
        return describe(error)
    # Tune keeps the text of an error that cannot be pickled: frames are indented, then it follows.
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [number for number, line in enumerate(lines) if line.startswith(" ")]
    after = lines[frames[-1] + 1 :] if frames else lines
    return (after or lines or [type(error).__name__])[0].strip()
