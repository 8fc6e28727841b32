"""Fine-tunes subnets by a training function of the user's own: every rate is a trial of Ray Tune.

A report is a checkpoint, which holds the network, the best weights so far and what the function
wants to keep. A trial that dies, and an experiment whose driver was killed, go on from there.
"""

import math
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from ray import tune
from torch import nn

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Scored
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.io.files import write_json
from cacp_ray.io.labels import Selector
from cacp_ray.io.numbers import as_number
from cacp_ray.io.schema import read_checked
from cacp_ray.pruning.subnet import SubnetFiles, build_network
from cacp_ray.rundir.finetuned import write_finetuned
from cacp_ray.rundir.schema import MetricsFile
from cacp_ray.tuning.experiment import (
    ReportCallback,
    TrialFiles,
    as_resources,
    check_trials,
    make_run_config,
    running_tune,
)
from cacp_ray.tuning.finetune import CHOICE_FILE, open_experiment, restore_tuner
from cacp_ray.tuning.train import STATE_FILE, read_state

Train = Callable[[nn.Module, "TrainContext"], object]


@dataclass
class TrainContext:
    """What a training function knows of its trial.

    Attributes:
        rate: Share of the cost that the network keeps.
        epoch: Reports so far: where to go on.
        state: What the last report kept; None at the start.
        before: Score of the network before training.
        history: What each report said.
    """

    rate: float
    epoch: int
    state: Any
    before: float
    history: list[dict[str, float]]
    _task: OwnTask = field(repr=False)
    _whole: nn.Module = field(repr=False)
    _best: dict[str, Any] = field(repr=False)
    _started: float = field(default_factory=time.monotonic, repr=False)

    def teacher(self) -> nn.Module:
        """The whole network in evaluation mode, to learn from."""
        return self._whole.eval()

    def score(self, net: nn.Module) -> float:
        """Score of a network by the task; all its layers keep their modes."""
        return self._measure(net).score

    def _measure(self, net: nn.Module) -> Scored:
        modes = {module: module.training for module in net.modules()}
        scored = self._task.measure(net)
        for module, mode in modes.items():
            module.training = mode
        return scored

    def report(self, net: nn.Module, state: Any = None, **figures: float) -> float:
        """Scores the network, keeps it where it is the best so far, and saves where training is.

        Call it once an epoch, or as often as training should be saved.

        Args:
            net: The network as it is now.
            state: What to go on with: tensors, numbers, texts, lists and dictionaries of them, such
                as `{"optimizer": optimizer.state_dict()}`.
            **figures: Other numbers for the history, such as a loss; those that are not finite are
                left out.

        Returns:
            The score.

        Raises:
            ConfigError: A figure is no number.
            EvaluationError: The score is not finite.
        """
        others = {name: as_number(f"context.report: {name}", n) for name, n in figures.items()}
        others = {name: number for name, number in others.items() if math.isfinite(number)}
        scored = self._measure(net)
        self.epoch += 1
        weights = {name: value.detach().cpu() for name, value in net.state_dict().items()}
        if scored.score > self._best["score"]:
            copies = {name: value.clone() for name, value in weights.items()}
            self._best = {"model": copies, "epoch": self.epoch, "score": scored.score}
        now = time.monotonic()
        row = {"epoch": self.epoch, "search_score": scored.score, **scored.figures, **others}
        self.history.append(row | {"epoch_seconds": now - self._started})
        self._started = now
        with tempfile.TemporaryDirectory() as folder:
            content = {
                "net": weights,
                "best": self._best,
                "before": self.before,
                "history": self.history,
                "state": state,
            }
            torch.save(content, Path(folder) / STATE_FILE)
            tune.report(
                row | {"best_score": self._best["score"]},
                checkpoint=tune.Checkpoint.from_directory(folder),
            )
        return scored.score


@dataclass(frozen=True)
class OwnJob:
    """What all trials share.

    Attributes:
        subnets: Subnets by rate, as the search left them.
        task: What scores.
        train: The training function.
        whole: The whole network.
        is_given: Whether subnets load with it, because it was given as an object.
        cpus: Threads of a trial.
        gpus: Share of a GPU for a trial.
        labels: Labels of the nodes that trials run on.
    """

    subnets: Mapping[float, SubnetFiles]
    task: OwnTask
    train: Train
    whole: nn.Module
    is_given: bool
    cpus: int
    gpus: float
    labels: Selector = field(default_factory=dict)

    def load(self, rate: float) -> nn.Module:
        """The subnet as the search left it."""
        whole = self.whole if self.is_given else None
        return build_network(self.subnets[rate], trust=True, model=whole)


def train_own(config: dict[str, Any], *, job: OwnJob) -> None:
    """A trial: trains the subnet of a rate, from its checkpoint where there is one."""
    torch.set_num_threads(job.cpus)
    device = "cuda" if job.gpus else "cpu"
    net = job.load(config["rate"])
    checkpoint = tune.get_checkpoint()
    if checkpoint is None:
        before = job.task.measure(net.to(device)).score
        weights = {name: value.detach().cpu().clone() for name, value in net.state_dict().items()}
        best = {"model": weights, "epoch": 0, "score": before}
        epoch, state, history = 0, None, []
    else:
        saved = read_state(checkpoint)
        net.load_state_dict(saved["net"])
        before, best, state = saved["before"], saved["best"], saved["state"]
        history, epoch = saved["history"], len(saved["history"])
    whole = job.whole.to(device)
    context = TrainContext(config["rate"], epoch, state, before, history, job.task, whole, best)
    job.train(net.to(device).train(), context)
    if context.epoch == 0:
        raise ConfigError("the training function ended without context.report(net)")


def finetune_own(
    job: OwnJob,
    folders: Mapping[float, Path],
    experiment_dir: Path,
    *,
    resume: bool,
    on_report: Callable[[Any], object],
    trial_files: TrialFiles | None = None,
) -> dict[float, dict[str, Any]]:
    """Trains every rate; writes `finetuned.safetensors` and `metrics.json` next to each subnet.

    Raises:
        ArtifactError: `experiment_dir` holds an experiment and `resume` is off.
        EvaluationError: A trial died more often than it is restarted.
    """
    experiment_dir = experiment_dir.resolve()
    content = {"rates": sorted(folders), "task": job.task.name}
    files = trial_files or TrialFiles(str(experiment_dir))
    open_experiment(experiment_dir, files, content, resume=resume)
    if (experiment_dir / CHOICE_FILE).exists():  # weights that came later stay as they are
        return {
            rate: read_checked(folder / "metrics.json", MetricsFile, ("score",))
            for rate, folder in folders.items()
        }
    trainable = tune.with_resources(
        tune.with_parameters(train_own, job=job),
        as_resources(job.cpus, job.gpus, job.labels),
    )
    space = {"rate": tune.grid_search(sorted(folders, reverse=True))}
    with running_tune(lambda trial, metrics: on_report({**trial.config, **metrics}), files):
        tuner = restore_tuner(trainable, space, files) if resume else None
        tuner = tuner or tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(trial_dirname_creator=_name_trial),
            run_config=make_run_config(files, [ReportCallback()], 2),
        )
        results: Any = tuner.fit()
    check_trials(results, "fine-tuning of")
    kept: dict[float, dict[str, Any]] = {}
    for result in results:
        rate = result.config["rate"]
        saved = read_state(result.checkpoint)
        net = job.load(rate)
        net.load_state_dict(saved["best"]["model"])
        kept[rate] = {
            "rate": rate,
            "epochs": len(saved["history"]),
            "best_epoch": saved["best"]["epoch"],
            "search_score_before": saved["before"],
            "score": saved["best"]["score"],
            "seconds": sum(row["epoch_seconds"] for row in saved["history"]),
            "history": saved["history"],
        }
        write_finetuned(folders[rate], net, kept[rate])
    write_json(experiment_dir / CHOICE_FILE, {f"{rate:g}": "" for rate in kept})
    return kept


def _name_trial(trial: Any) -> str:
    return f"rate-{trial.config['rate']:g}"
