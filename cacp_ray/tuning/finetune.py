"""Fine-tunes the subnets of all rates side by side, as Ray Tune trials.

A trial is a rate and a variant of the recipe. Tune starts the trials, restarts those that die from
their last epoch, and restores the whole experiment after a killed driver. The images lie in Ray's
object store once, and all trials read them without a copy.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import ray
from pyarrow import fs
from ray import tune
from ray.tune.experiment import Trial
from torch import nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.files import changed_keys, write_json, write_tensors
from cacp_ray.io.schema import Content, read_checked
from cacp_ray.reporting.progress import FinetuneProgress
from cacp_ray.rundir.schema import MetricsFile
from cacp_ray.training.recipe import Recipe
from cacp_ray.tuning.experiment import (
    ReportCallback,
    TrialFiles,
    as_resources,
    check_trials,
    make_loggers,
    make_run_config,
    restore,
    running_tune,
)
from cacp_ray.tuning.scheduler import SchedulerPerRate, make_asha
from cacp_ray.tuning.train import Resources, TrialTask, name_trial
from cacp_ray.tuning.trial import PATH_KEY, FinetuneResult, Trained, finetune_trial, keep_best
from cacp_ray.tuning.workers import COORDINATOR_CPUS, MAX_TRIALS, FreeAbandoned, free_abandoned

CHOICE_FILE = "chosen.json"  # chosen variant by rate; written last, so it marks the end


def finetune_subnets(
    *,
    load_subnets: Mapping[float, Callable[[], nn.Module]],  # by rate
    load_teacher: Callable[[], nn.Module],
    subnet_folders: Mapping[float, Path],  # by rate: where results are written
    train_split: ImageSet | ImageStream,
    search_split: ImageSet,  # chooses the variant and the epoch whose weights are kept
    test_split: ImageSet | ImageStream,  # measured once for each subnet, with the chosen weights
    recipes: Mapping[str, Recipe],
    experiment_dir: Path,
    resources: Resources,
    resume: bool,  # continue the experiment, or begin one where there is none
    on_epoch: Callable[[FinetuneProgress], None],
    stops_poor: bool = False,  # ASHA stops the poorer variants of each rate
    loggers: Sequence[str] = (),  # see `make_loggers`
    project: str = "",
    source: Mapping[str, Any] | None = None,  # where images and teacher come from, in JSON
    trial_files: TrialFiles | None = None,  # None: in `experiment_dir`, which all nodes share
) -> dict[float, FinetuneResult]:
    """Fine-tunes every subnet; writes `finetuned.safetensors` and `metrics.json` next to each.

    Each trial is one process, or several workers, each with its resources on one node. As many
    trials run at once as the free resources of the cluster allow, the largest rate first because it
    takes longest. A trial waits for ever where no node has what it asks for, or where actors of the
    caller still hold it: close the evaluator pool first.

    All nodes must be able to read and write the files of the trials; the folders of the subnets are
    this process's own. `TrialTask` explains the loaders, which must be picklable, and the recipes;
    every rate is trained by each. `on_epoch` is called
    in this process with every finished epoch; a continued fine-tuning begins with the last epoch of
    each trial.

    Raises:
        ArtifactError: `experiment_dir` holds an experiment and `resume` is off.
        ConfigError: The experiment has other rates, recipes, scheduler, loggers or source, or a
            logger is not installed.
        EvaluationError: A trial died more often than it is restarted.
    """
    experiment_dir = experiment_dir.resolve()
    callbacks = [ReportCallback(), *make_loggers(loggers, project)]
    content = {
        **(source or {}),
        "rates": sorted(subnet_folders),
        "recipes": {name: dataclasses.asdict(recipe) for name, recipe in recipes.items()},
        "trials": {"scheduler": "asha" if stops_poor else "plain", "logging": list(loggers)},
    }
    files = trial_files or TrialFiles(str(experiment_dir))
    open_experiment(experiment_dir, files, content, resume=resume)
    if (experiment_dir / CHOICE_FILE).exists():
        return {rate: _read_result(folder) for rate, folder in subnet_folders.items()}
    task = TrialTask(
        load_subnets=load_subnets,
        load_teacher=load_teacher,
        recipes=dict(recipes),
        resources=resources,
        trials=files.path,
        filesystem=files.filesystem,
    )
    splits = [ray.put(train_split), ray.put(search_split)]
    trainable = tune.with_resources(
        tune.with_parameters(finetune_trial, task=task, splits=splits),
        _as_tune_resources(resources),
    )
    if resources.most_workers > 1:
        callbacks.append(FreeAbandoned())
    space = {
        "rate": tune.grid_search(sorted(subnet_folders, reverse=True)),
        "variant": tune.grid_search(list(recipes)),
    }
    epochs = {name: recipe.epochs for name, recipe in recipes.items()}
    with running_tune(
        lambda trial, metrics: on_epoch(_read_progress(trial.config, metrics, epochs)), files
    ):
        tuner = restore_tuner(trainable, space, files) if resume else None
        for result in tuner.get_results() if tuner else ():
            if "epoch" in (result.metrics or {}):
                progress = _read_progress(result.config, result.metrics, epochs)
                on_epoch(dataclasses.replace(progress, is_restored=True))
        asha = SchedulerPerRate(partial(make_asha, max(epochs.values()))) if stops_poor else None
        tuner = tuner or tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                reuse_actors=asha is None,
                scheduler=asha,
                max_concurrent_trials=MAX_TRIALS if resources.most_workers > 1 else None,
                trial_dirname_creator=_name_trial,
            ),
            # The last checkpoint holds the best weights too. Until the experiment is saved again,
            # it names the one before.
            run_config=make_run_config(files, callbacks, 2),
        )
        results: Any = tuner.fit()
    check_trials(results, "fine-tuning of")
    trials = {
        rate: sorted(
            (result for result in results if result.config["rate"] == rate),
            key=lambda result: list(recipes).index(result.config["variant"]),
        )
        for rate in subnet_folders
    }
    best = {  # the first of equals
        rate: max(variants, key=lambda result: result.metrics["best_score"])
        for rate, variants in trials.items()
    }
    kept = _keep_best(task, trials, best, len(search_split), test_split)
    for rate, trained in kept.items():  # the metrics last: they name the weights
        folder = subnet_folders[rate]
        write_tensors(folder / "finetuned.safetensors", trained.tensors)
        write_json(folder / "metrics.json", trained.metrics)
    choice = {f"{rate:g}": result.config["variant"] for rate, result in best.items()}
    write_json(experiment_dir / CHOICE_FILE, choice)
    return {rate: trained.result for rate, trained in kept.items()}


def _keep_best(
    task: TrialTask,
    trials: Mapping[float, Sequence[Any]],
    best: Mapping[float, Any],
    search_images: int,
    test_split: ImageSet | ImageStream,
) -> dict[float, Trained]:
    """Runs `keep_best` for the best trial of each rate, as tasks with a trial's resources."""
    resources = task.resources
    keep: Any = ray.remote(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        label_selector=dict(resources.labels),
    )(cast(Any, keep_best))
    shared = ray.put(task), search_images, ray.put(test_split)
    kept = [
        keep.remote(
            result.config,
            _find_checkpoint(result, task.filesystem),
            _summarize(trials[rate]),
            *shared,
        )
        for rate, result in best.items()
    ]
    if resources.most_workers > 1:
        while ray.wait(kept, num_returns=len(kept), timeout=1.0)[1]:
            free_abandoned()  # the workers of the trials that ended last
    return dict(zip(best, ray.get(kept), strict=True))


def _read_progress(config: Any, metrics: Any, epochs: Mapping[str, int]) -> FinetuneProgress:
    return FinetuneProgress(
        rate=config["rate"],
        variant=config["variant"],
        epoch=metrics["epoch"],
        epochs=epochs[config["variant"]],
        train_loss=metrics["train_loss"],
        search_score=metrics["search_score"],
        seconds=metrics["epoch_seconds"],
    )


def _summarize(variants: Sequence[Any]) -> dict[str, Any]:
    """What metrics.json says of all variants of a rate."""
    return {
        result.config["variant"]: {
            "epochs": result.metrics["epoch"],
            "search_score": result.metrics["best_score"],
        }
        for result in variants
    }


def _find_checkpoint(result: Any, filesystem: fs.FileSystem | None) -> Any:
    path = result.metrics.get(PATH_KEY)
    return tune.Checkpoint(path, filesystem) if path else result.checkpoint


def _as_tune_resources(resources: Resources) -> Any:
    if resources.most_workers > 1:
        return {"cpu": COORDINATOR_CPUS}
    return as_resources(resources.cpus, resources.gpus, resources.labels)


def open_experiment(
    experiment_dir: Path, files: TrialFiles, content: dict[str, Any], *, resume: bool
) -> None:
    """Notes what the experiment tries, or checks it: Tune would continue any other as well.

    What it tries is also noted beside the trials in an object store, whose folder may outlive ours.
    """
    if files.filesystem is not None:
        content = content | {"storage": files.path}
        if not (experiment_dir / CHOICE_FILE).exists():  # else it needs its trials no more
            files.note(content, resume=resume)
    file = experiment_dir / "finetune.json"
    if not file.exists():
        if experiment_dir.exists() and any(
            path.name[0] != "."
            for path in experiment_dir.iterdir()  # a kill leaves hidden files
        ):
            raise ArtifactError(
                f"{experiment_dir} holds files, but no fine-tuning that was begun here (no "
                "finetune.json): delete it, or move it away"
            )
        write_json(file, content)
    elif not resume and (experiment_dir / CHOICE_FILE).exists():
        raise ArtifactError(
            f"{experiment_dir} holds a finished fine-tuning: delete that folder to fine-tune again"
        )
    elif not resume:
        raise ArtifactError(
            f"{experiment_dir} holds a fine-tuning: pass --resume (in Python resume=True) to "
            "continue it, or delete it"
        )
    elif (saved := _with_defaults(read_checked(file, Content))) != content:
        # The recipe of an experiment without variants has an empty name.
        changed = ", ".join(changed_keys(saved, content)).replace("..", ".")
        raise ConfigError(
            f"{experiment_dir} was begun with other settings ({changed}): undo the change, or "
            "delete that folder to fine-tune again"
        )


def _with_defaults(content: dict[str, Any]) -> dict[str, Any]:
    """An experiment of an older version says nothing about settings that it did not know."""
    recipes = content.get("recipes")
    if not isinstance(recipes, dict):
        return content
    defaults = dataclasses.asdict(Recipe())
    return content | {
        "recipes": {
            name: defaults | recipe if isinstance(recipe, dict) else recipe
            for name, recipe in recipes.items()
        }
    }


def restore_tuner(trainable: Any, space: dict[str, Any], files: TrialFiles) -> tune.Tuner | None:
    """The experiment to continue; None where there is none."""
    if not files.can_restore():
        return None
    tuner = restore(files, trainable, space)
    # A driver killed between replacing a checkpoint and saving leaves the name of one that is gone.
    # Training is repeatable, so starting over ends with the same weights.
    checkpoints = [result.checkpoint for result in tuner.get_results()]
    is_whole = all(
        checkpoint.filesystem.get_file_info(checkpoint.path).type != fs.FileType.NotFound
        for checkpoint in checkpoints
        if checkpoint
    )
    return tuner if is_whole else None


def _name_trial(trial: Trial) -> str:
    return name_trial(trial.config)


def _read_result(folder: Path) -> FinetuneResult:
    names = [field.name for field in dataclasses.fields(FinetuneResult)]
    metrics = read_checked(folder / "metrics.json", MetricsFile, names)
    return FinetuneResult(**{name: metrics[name] for name in names})
