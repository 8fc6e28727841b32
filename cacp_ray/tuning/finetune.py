"""Fine-tunes the subnets of all rates side by side, as Ray Tune trials.

One trial a rate, each in a process of its own. Tune starts them, restarts those that die from their
last epoch, and restores the whole experiment after a killed driver. The images are put into the
object store once and read by all trials without a copy.
"""

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError
from cacp_ray.files import read_json, write_json
from cacp_ray.training.recipe import Recipe
from cacp_ray.tuning.trial import FinetuneResult, TrialTask, finetune_trial

# A trial may die this often and is restarted from its last epoch.
MAX_FAILURES = 2

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


@dataclass(frozen=True)
class FinetuneProgress:
    """One finished epoch of one subnet.

    Attributes:
        rate: Of the subnet, share of the original cost kept.
        epoch: In [1, epochs].
        epochs: Of the schedule.
        train_loss: Mean over the epoch.
        search_top1: On the search split, share in [0, 1].
        seconds: Of this epoch.
    """

    rate: float
    epoch: int
    epochs: int
    train_loss: float
    search_top1: float
    seconds: float


# Tune pickles its callbacks with the experiment and restores those, not the ones of the new driver,
# so the listener of this driver is kept beside them.
_on_epoch: ContextVar[Callable[[FinetuneProgress], None]] = ContextVar("_on_epoch")


class _ProgressCallback(tune.Callback):
    """Hands every reported epoch to the listener of this driver."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune in the driver, once an epoch of a trial."""
        progress = FinetuneProgress(
            rate=trial.config["rate"],
            epoch=result["epoch"],
            epochs=self.epochs,
            train_loss=result["train_loss"],
            search_top1=result["search_top1"],
            seconds=result["epoch_seconds"],
        )
        _on_epoch.get()(progress)


def finetune_subnets(
    *,
    load_subnet: Callable[[Path], nn.Module],
    load_teacher: Callable[[], nn.Module],
    subnet_folders: dict[float, Path],
    train_split: ImageSet,
    search_split: ImageSet,
    test_split: ImageSet,
    recipe: Recipe,
    experiment_dir: Path,
    cpus_per_trial: int,
    resume: bool,
    on_epoch: Callable[[FinetuneProgress], None],
) -> dict[float, FinetuneResult]:
    """Fine-tunes every subnet; `finetuned.safetensors` and `metrics.json` appear beside each.

    Each trial is one process and asks for `cpus_per_trial` CPUs, in one bundle on one node, and for
    nothing else; torch uses as many threads. As many trials run at once as the free CPUs of the
    cluster allow, the others wait, the largest rate first because it takes longest. A trial waits
    for ever where no node has that many CPUs, or where actors of the caller still hold them: close
    the evaluator pool first. A trial needs memory for all images as float32 beside its networks.

    Args:
        load_subnet: Builds the subnet of a folder as the search left it, never with weights of an
            earlier fine-tuning; picklable.
        load_teacher: Builds the base model; picklable; called only where the recipe distils.
        subnet_folders: Folder of each rate's subnet, readable and writable on all nodes.
        train_split: Images to learn from.
        search_split: Chooses the epoch whose weights are kept.
        test_split: Measured once a subnet, for the chosen weights.
        recipe: Schedule and loss.
        experiment_dir: Of Tune's own files.
        cpus_per_trial: CPUs and torch threads of a trial.
        resume: Go on with what `experiment_dir` holds; an empty one is begun.
        on_epoch: Called in this process with every finished epoch.

    Raises:
        ArtifactError: `experiment_dir` holds an experiment and `resume` is off.
        ConfigError: That experiment has other rates or another recipe.
        EvaluationError: A trial died more often than it is restarted.
    """
    experiment_dir = experiment_dir.resolve()
    _open_experiment(experiment_dir, subnet_folders, recipe, resume=resume)
    task = TrialTask(
        subnet_folders={rate: folder.resolve() for rate, folder in subnet_folders.items()},
        load_subnet=load_subnet,
        load_teacher=load_teacher,
        recipe=recipe,
        num_threads=cpus_per_trial,
    )
    trainable = tune.with_resources(
        tune.with_parameters(
            finetune_trial,
            task=task,
            train_split=train_split,
            search_split=search_split,
            test_split=test_split,
        ),
        {"cpu": cpus_per_trial},
    )
    listener = _on_epoch.set(on_epoch)
    try:
        with quiet_tune():
            results = _make_tuner(trainable, list(subnet_folders), recipe, experiment_dir).fit()
    finally:
        _on_epoch.reset(listener)
    for result in results:
        if result.error is not None:
            raise EvaluationError(
                f"fine-tuning of {Path(result.path).name} failed {MAX_FAILURES + 1} times "
                f"({last_line(result.error)}); see {result.path}, then continue with --resume"
            )
    return {rate: _read_result(folder) for rate, folder in task.subnet_folders.items()}


def _open_experiment(
    experiment_dir: Path, rates: Iterable[float], recipe: Recipe, *, resume: bool
) -> None:
    """Writes or checks what the experiment is of: Tune itself would go on with the old rates."""
    file = experiment_dir / "finetune.json"
    content = {"rates": sorted(rates), "recipe": dataclasses.asdict(recipe)}
    if not file.exists():
        write_json(file, content)
    elif not resume:
        raise ArtifactError(
            f"{experiment_dir} holds a fine-tuning: pass --resume to continue it, or delete it"
        )
    elif (saved := read_json(file)) != content:
        raise ConfigError(
            f"{experiment_dir} was begun for {saved}, now {content} is asked: "
            "undo the change, or delete that folder to fine-tune again"
        )


def _make_tuner(
    trainable: Any, rates: list[float], recipe: Recipe, experiment_dir: Path
) -> tune.Tuner:
    space = {"rate": tune.grid_search(sorted(rates, reverse=True))}
    # A driver that was killed before its first save left nothing to restore.
    has_state = any(experiment_dir.glob("experiment_state-*.json"))
    if has_state and tune.Tuner.can_restore(str(experiment_dir)):
        tuner = tune.Tuner.restore(
            str(experiment_dir),
            trainable=trainable,
            param_space=space,
            resume_unfinished=True,
            resume_errored=True,
        )
        # One killed between replacing a checkpoint and saving that names a checkpoint that is gone.
        # Training is repeatable, so starting over ends with the same weights.
        checkpoints = [result.checkpoint for result in tuner.get_results()]
        if all(Path(checkpoint.path).exists() for checkpoint in checkpoints if checkpoint):
            return tuner
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(reuse_actors=True, trial_dirname_creator=_name_trial),
        run_config=tune.RunConfig(
            name=experiment_dir.name,
            storage_path=str(experiment_dir.parent),
            verbose=0,
            callbacks=[_ProgressCallback(recipe.epochs)],
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            # The last holds the best weights too; the one before it is what the experiment names
            # until it is saved again.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )


def _name_trial(trial: Trial) -> str:
    return f"rate-{trial.config['rate']:g}"


@contextmanager
def quiet_tune() -> Iterator[None]:
    """Tune neither prints nor changes folders; its errors reach the caller as exceptions."""
    before = {key: os.environ.get(key) for key in TUNE_ENVIRONMENT}
    tune_logger = logging.getLogger("ray.tune")
    level = tune_logger.level
    os.environ.update(TUNE_ENVIRONMENT)
    tune_logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        tune_logger.setLevel(level)
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def last_line(error: BaseException | None) -> str:
    """Of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def _read_result(folder: Path) -> FinetuneResult:
    metrics = read_json(folder / "metrics.json")
    return FinetuneResult(**{f.name: metrics[f.name] for f in dataclasses.fields(FinetuneResult)})
