"""Fine-tunes the subnets of all rates side by side, as Ray Tune trials.

A trial is a rate and a variant of the recipe. Tune starts them, restarts those that die from their
last epoch, and restores the whole experiment after a killed driver. The images are put into the
object store once and read by all trials without a copy.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.files import changed_keys, read_json, read_object, write_json
from cacp_ray.training.recipe import Recipe
from cacp_ray.tuning.experiment import (
    MAX_FAILURES,
    can_restore,
    check_trials,
    make_loggers,
    quiet_tune,
    restore,
)
from cacp_ray.tuning.scheduler import SchedulerPerRate, make_asha
from cacp_ray.tuning.trial import (
    PATH_KEY,
    FinetuneResult,
    Resources,
    TrialTask,
    finetune_trial,
    keep_best,
)
from cacp_ray.tuning.workers import COORDINATOR_CPUS, MAX_TRIALS, FreeAbandoned, free_abandoned

CHOICE_FILE = "chosen.json"  # by rate, the variant; there once all is written


@dataclass(frozen=True)
class FinetuneProgress:
    """One finished epoch of one trial.

    Attributes:
        rate: Of the subnet, share of the original cost kept.
        variant: Of the recipe; empty where there is one.
        epoch: In [1, epochs].
        epochs: Of the schedule.
        train_loss: Mean over the epoch.
        search_top1: On the search split, share in [0, 1].
        seconds: Of this epoch.
        is_restored: The last one before the fine-tuning was interrupted, shown again.
    """

    rate: float
    variant: str
    epoch: int
    epochs: int
    train_loss: float
    search_top1: float
    seconds: float
    is_restored: bool = False


# Tune pickles its callbacks with the experiment and restores those, not the ones of the new driver,
# so the listener of this driver is kept beside them.
_on_epoch: ContextVar[Callable[[FinetuneProgress], None]] = ContextVar("_on_epoch")


class _ProgressCallback(tune.Callback):
    """Hands every reported epoch to the listener of this driver."""

    def __init__(self, epochs: Mapping[str, int]) -> None:
        self.epochs = epochs  # by variant

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        """Called by Tune in the driver, once an epoch of a trial."""
        _on_epoch.get()(_read_progress(trial.config, result, self.epochs))


def _read_progress(config: Any, metrics: Any, epochs: Mapping[str, int]) -> FinetuneProgress:
    return FinetuneProgress(
        rate=config["rate"],
        variant=config["variant"],
        epoch=metrics["epoch"],
        epochs=epochs[config["variant"]],
        train_loss=metrics["train_loss"],
        search_top1=metrics["search_top1"],
        seconds=metrics["epoch_seconds"],
    )


def finetune_subnets(
    *,
    load_subnet: Callable[[Path], nn.Module],
    load_teacher: Callable[[], nn.Module],
    subnet_folders: dict[float, Path],
    train_split: ImageSet | ImageStream,
    search_split: ImageSet,
    test_split: ImageSet | ImageStream,
    recipes: Mapping[str, Recipe],
    experiment_dir: Path,
    resources: Resources,
    resume: bool,
    on_epoch: Callable[[FinetuneProgress], None],
    stops_poor: bool = False,
    loggers: Sequence[str] = (),
    project: str = "",
    source: Mapping[str, Any] | None = None,
) -> dict[float, FinetuneResult]:
    """Fine-tunes every subnet; `finetuned.safetensors` and `metrics.json` appear beside each.

    Each trial is one process, or several workers, each with its resources in one bundle on one
    node. As many trials run at once as the free resources of the cluster allow, the others wait,
    the largest rate first because it takes longest. A trial waits for ever where no node has what
    it asks for, or where actors of the caller still hold it: close the evaluator pool first.

    Args:
        load_subnet: Builds the subnet of a folder as the search left it, never with weights of an
            earlier fine-tuning; picklable.
        load_teacher: Builds the teacher; picklable; called only where the recipe distils.
        subnet_folders: Folder of each rate's subnet, readable and writable on all nodes.
        train_split: Images to learn from.
        search_split: Chooses the epoch whose weights are kept, and the variant.
        test_split: Measured once a subnet, for the chosen weights.
        recipes: Schedule and loss, by the name of the variant; every rate is trained by each.
        experiment_dir: Of Tune's own files.
        resources: Of a trial.
        resume: Go on with what `experiment_dir` holds; an empty one is begun.
        on_epoch: Called in this process with every finished epoch; of a continued fine-tuning,
            first with the last one of each trial.
        stops_poor: ASHA stops the poorer variants of each rate.
        loggers: Of Tune: `tensorboard`, `csv`, `json`, `wandb`, `mlflow`.
        project: Of the loggers `wandb` and `mlflow`.
        source: Where images and teacher come from, in JSON: resumed with the same alone.

    Raises:
        ArtifactError: `experiment_dir` holds an experiment and `resume` is off.
        ConfigError: That experiment has other rates, recipes, scheduler, loggers or source, or a
            logger is not installed.
        EvaluationError: A trial died more often than it is restarted.
    """
    experiment_dir = experiment_dir.resolve()
    callbacks = make_loggers(loggers, project)
    content = {
        **(source or {}),
        "rates": sorted(subnet_folders),
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "trials": {"scheduler": "asha" if stops_poor else "plain", "logging": list(loggers)},
    }
    _open_experiment(experiment_dir, content, resume=resume)
    task = TrialTask(
        subnet_folders={rate: folder.resolve() for rate, folder in subnet_folders.items()},
        load_subnet=load_subnet,
        load_teacher=load_teacher,
        recipes=dict(recipes),
        resources=resources,
    )
    if (experiment_dir / CHOICE_FILE).exists():
        return {rate: _read_result(folder) for rate, folder in task.subnet_folders.items()}
    trainable = tune.with_resources(
        tune.with_parameters(
            finetune_trial, task=task, splits=[ray.put(train_split), ray.put(search_split)]
        ),
        _ask(resources),
    )
    epochs = {name: each.epochs for name, each in recipes.items()}
    callbacks.insert(0, _ProgressCallback(epochs))
    if resources.most_workers > 1:
        callbacks.append(FreeAbandoned())
    scheduler = _make_scheduler(recipes) if stops_poor else None
    space = {
        "rate": tune.grid_search(sorted(subnet_folders, reverse=True)),
        "variant": tune.grid_search(list(recipes)),
    }
    listener = _on_epoch.set(on_epoch)
    try:
        with quiet_tune():
            tuner = _restore_tuner(trainable, space, experiment_dir)
            for each in tuner.get_results() if tuner else ():
                if "epoch" in (each.metrics or {}):
                    progress = _read_progress(each.config, each.metrics, epochs)
                    on_epoch(dataclasses.replace(progress, is_restored=True))
            at_once = MAX_TRIALS if resources.most_workers > 1 else None
            tuner = tuner or _make_tuner(
                trainable, space, experiment_dir, callbacks, scheduler, at_once
            )
            results = tuner.fit()
    finally:
        _on_epoch.reset(listener)
    check_trials(results, "fine-tuning of")
    keep: Any = ray.remote(num_cpus=resources.cpus, num_gpus=resources.gpus)(cast(Any, keep_best))
    shared = {
        "task": ray.put(task),
        "search_images": len(search_split),
        "test_split": ray.put(test_split),
    }
    trials = {rate: _trials_of(results, rate, list(recipes)) for rate in subnet_folders}
    best = {  # the first of equals
        rate: max(mine, key=lambda each: each.metrics["best_top1"]) for rate, mine in trials.items()
    }
    kept = [
        keep.remote(each.config, _find_checkpoint(each), _summary(trials[rate]), **shared)
        for rate, each in best.items()
    ]
    if resources.most_workers > 1:
        while ray.wait(kept, num_returns=len(kept), timeout=1.0)[1]:
            free_abandoned()  # by the trials that ended last
    found = ray.get(kept)
    choice = {f"{rate:g}": each.config["variant"] for rate, each in best.items()}
    write_json(experiment_dir / CHOICE_FILE, choice)
    return dict(zip(best, found, strict=True))


def _trials_of(results: Any, rate: float, variants: list[str]) -> list[Any]:
    mine = [each for each in results if each.config["rate"] == rate]
    return sorted(mine, key=lambda each: variants.index(each.config["variant"]))


def _summary(trials: list[Any]) -> dict[str, Any]:
    """Of all variants of a rate, for its metrics.json."""
    return {
        each.config["variant"]: {
            "epochs": each.metrics["epoch"],
            "search_top1": each.metrics["best_top1"],
        }
        for each in trials
    }


def _find_checkpoint(result: Any) -> Any:
    path = result.metrics.get(PATH_KEY)
    return tune.Checkpoint(path) if path else result.checkpoint


def _ask(resources: Resources) -> Any:
    if resources.most_workers > 1:
        return {"cpu": COORDINATOR_CPUS}
    return {"cpu": resources.cpus, **({"gpu": resources.gpus} if resources.gpus else {})}


def _make_scheduler(recipes: Mapping[str, Recipe]) -> TrialScheduler:
    longest = max(recipe.epochs for recipe in recipes.values())
    return SchedulerPerRate(partial(make_asha, longest, max(1, longest // 3)))


def _open_experiment(experiment_dir: Path, content: dict[str, Any], *, resume: bool) -> None:
    """Writes or checks what the experiment is of: Tune itself would go on with the old one."""
    file = experiment_dir / "finetune.json"
    if not file.exists():
        write_json(file, content)
    elif not resume and (experiment_dir / CHOICE_FILE).exists():
        raise ArtifactError(
            f"{experiment_dir} holds a finished fine-tuning: delete that folder to fine-tune again"
        )
    elif not resume:
        raise ArtifactError(
            f"{experiment_dir} holds a fine-tuning: pass --resume to continue it, or delete it"
        )
    elif (saved := read_json(file)) != content:
        # The one recipe of an experiment without variants has no name.
        changed = ", ".join(changed_keys(saved, content)).replace("..", ".")
        raise ConfigError(
            f"{experiment_dir} was begun with other settings ({changed}): undo the change, or "
            "delete that folder to fine-tune again"
        )


def _restore_tuner(
    trainable: Any, space: dict[str, Any], experiment_dir: Path
) -> tune.Tuner | None:
    """To go on with; None where there is nothing to go on with."""
    if not can_restore(experiment_dir):
        return None
    tuner = restore(experiment_dir, trainable, space)
    # One killed between replacing a checkpoint and saving that names a checkpoint that is gone.
    # Training is repeatable, so starting over ends with the same weights.
    checkpoints = [result.checkpoint for result in tuner.get_results()]
    is_whole = all(Path(checkpoint.path).exists() for checkpoint in checkpoints if checkpoint)
    return tuner if is_whole else None


def _make_tuner(
    trainable: Any,
    space: dict[str, Any],
    experiment_dir: Path,
    callbacks: list[tune.Callback],
    scheduler: TrialScheduler | None,
    at_once: int | None,
) -> tune.Tuner:
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            reuse_actors=scheduler is None,
            scheduler=scheduler,
            max_concurrent_trials=at_once,
            trial_dirname_creator=_name_trial,
        ),
        run_config=tune.RunConfig(
            name=experiment_dir.name,
            storage_path=str(experiment_dir.parent),
            verbose=0,
            callbacks=callbacks,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            # The last holds the best weights too; the one before it is what the experiment names
            # until it is saved again.
            checkpoint_config=tune.CheckpointConfig(num_to_keep=2),
        ),
    )


def _name_trial(trial: Trial) -> str:
    variant = trial.config["variant"]
    return f"rate-{trial.config['rate']:g}" + (f"-{variant}" if variant else "")


def _read_result(folder: Path) -> FinetuneResult:
    names = [field.name for field in dataclasses.fields(FinetuneResult)]
    metrics = read_object(folder / "metrics.json", names)
    return FinetuneResult(**{name: metrics[name] for name in names})
