"""Fine-tuning as Tune trials, with images and models so small that an epoch takes no time."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray._private.state import actors
from safetensors.torch import load_file
from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError
from cacp_ray.io.files import write_tensors
from cacp_ray.reporting.progress import FinetuneProgress
from cacp_ray.training.loop import make_batches, train
from cacp_ray.training.metrics import measure
from cacp_ray.training.recipe import Recipe
from cacp_ray.tuning.finetune import finetune_subnets
from cacp_ray.tuning.train import Resources
from cacp_ray.tuning.trial import FinetuneResult

pytestmark = pytest.mark.ray

RECIPE = Recipe(epochs=3, batch_size=16, lr=0.05, padding=1, distillation=0.5, seed=5)
BATCHES_PER_EPOCH = 4
TEST_IMAGES = 40


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def make_split(count: int, seed: int) -> ImageSet:
    """Class 1 is brighter in the first channel."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    images = rng.integers(0, 160, (count, 8, 8, 3), dtype=np.uint8)
    images[..., 0] += (60 * labels[:, None, None]).astype(np.uint8)
    return ImageSet(images, labels, ("dark", "bright"))


SPLITS = {
    "train_split": make_split(64, 0),
    "search_split": make_split(32, 1),
    "test_split": make_split(TEST_IMAGES, 2),
}


def load_model(folder: Path) -> nn.Module:
    model = make_model()
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model


def load_recorded(folder: Path) -> nn.Module:
    """Writes down the size of every batch that the model sees in evaluation mode."""
    model = load_model(folder)

    def record(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if not module.training:
            with (folder / "evaluated").open("a") as file:
                file.write(f"{len(inputs[0])}\n")

    model.register_forward_pre_hook(record)
    return model


def load_mortal(folder: Path) -> nn.Module:
    """If the folder says so, the process dies once, in the middle of the second epoch."""
    model = load_model(folder)
    batches = 0

    def die_once(module: nn.Module, inputs: tuple[Tensor]) -> None:
        nonlocal batches
        batches += module.training
        if batches == BATCHES_PER_EPOCH + 2 and (folder / "dies").exists():
            (folder / "dies").unlink()
            os._exit(1)

    model.register_forward_pre_hook(die_once)
    return model


EPOCH_SECONDS = 1.6  # longer than Tune takes to save the experiment


def load_slow(folder: Path) -> nn.Module:
    """Writes down its process and trains slowly."""
    (folder / "pid").write_text(str(os.getpid()))
    model = load_model(folder)
    pause = EPOCH_SECONDS / BATCHES_PER_EPOCH
    model.register_forward_pre_hook(lambda module, inputs: time.sleep(pause * module.training))
    return model


def load_missing(folder: Path) -> nn.Module:
    raise ArtifactError(f"{folder}: no subnet here")


def finetune(
    root: Path,
    *,
    load_subnet: Callable[[Path], nn.Module] = load_model,
    rates: tuple[float, ...] = (0.3, 0.5),
    recipe: Recipe = RECIPE,
    recipes: dict[str, Recipe] | None = None,
    workers: int | tuple[int, int] = 1,
    cpus: int = 1,
    resume: bool = False,
    on_epoch: Callable[[FinetuneProgress], None] = lambda progress: None,
    **options: Any,
) -> dict[float, FinetuneResult]:
    return finetune_subnets(
        load_subnets={rate: partial(load_subnet, root / f"rate-{rate:.2f}") for rate in rates},
        load_teacher=partial(load_model, root / "teacher"),
        subnet_folders={rate: root / f"rate-{rate:.2f}" for rate in rates},
        recipes=recipes or {"": recipe},
        experiment_dir=root / "finetune",
        resources=Resources(cpus, workers=workers),
        resume=resume,
        on_epoch=on_epoch,
        **SPLITS | options,
    )


def save_fresh(folder: Path, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = make_model()
    write_tensors(folder / "model.safetensors", model.state_dict())
    return model


def save_trained(folder: Path) -> nn.Module:
    torch.manual_seed(1)
    model = make_model()
    recipe = Recipe(epochs=12, batch_size=16, lr=0.2, padding=1)
    batches = make_batches(SPLITS["train_split"], recipe)
    train(model, batches, SPLITS["search_split"], recipe)
    write_tensors(folder / "model.safetensors", model.state_dict())
    return model


@pytest.mark.parametrize("resume", [False, True])
def test_an_experiment_that_was_not_begun_here_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "tuner.pkl").write_bytes(b"anything")
    with pytest.raises(ArtifactError, match=r"no fine-tuning that was begun here \(no finetune"):
        finetune(tmp_path, resume=resume)


def epochs_by_rate(events: list[FinetuneProgress]) -> dict[float, list[int]]:
    """Epochs that were trained, without those shown again after a kill."""
    new = [event for event in events if not event.is_restored]
    return {rate: [e.epoch for e in new if e.rate == rate] for rate in {e.rate for e in new}}


def read_finetuned(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "finetuned.safetensors")


def assert_same(first: dict[str, Any], second: dict[str, Any]) -> None:
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.equal(value, second[key]), key


@pytest.mark.usefixtures("ray_cluster")
def test_the_best_weights_by_search_accuracy_are_kept_and_tested_once(
    tmp_path: Path,
) -> None:
    root = Path(os.path.relpath(tmp_path))  # trials read it the same way
    save_fresh(root / "rate-0.30")
    teacher = save_trained(root / "rate-0.50")
    write_tensors(root / "teacher" / "model.safetensors", teacher.state_dict())
    events: list[FinetuneProgress] = []

    results = finetune(root, load_subnet=load_recorded, on_epoch=events.append)

    assert epochs_by_rate(events) == {0.3: [1, 2, 3], 0.5: [1, 2, 3]}
    assert all(event.epochs == 3 and event.seconds > 0 for event in events)
    assert list(results) == [0.3, 0.5]
    for rate, result in results.items():
        folder = root / f"rate-{rate:.2f}"
        metrics = json.loads((folder / "metrics.json").read_text())
        assert metrics["recipe"]["epochs"] == 3
        assert metrics["best_epoch"] == result.best_epoch
        model = make_model()
        model.load_state_dict(read_finetuned(folder))
        test = measure(model, *SPLITS["test_split"].tensors())
        assert (result.test_score, result.test_images) == (test.top1, TEST_IMAGES)
        assert result.test_loss == pytest.approx(test.loss)
        evaluated = (folder / "evaluated").read_text().split()
        assert evaluated == ["32"] * 4 + [str(TEST_IMAGES)]
        reached = [event.search_score for event in events if event.rate == rate]
        accuracies = [result.search_score_before, *reached]
        assert result.search_score == max(accuracies)
        assert result.best_epoch == accuracies.index(max(accuracies))
        assert [epoch["search_score"] for epoch in metrics["history"]] == reached
    # Training improves the fresh network; the trained one was perfect and stays as it was.
    assert results[0.3].best_epoch > 0
    assert results[0.5].best_epoch == 0
    assert_same(read_finetuned(root / "rate-0.50"), teacher.state_dict())

    events.clear()
    assert finetune(root, resume=True, on_epoch=events.append) == results
    assert events == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_dies_goes_on_from_its_last_epoch_to_the_same_weights(tmp_path: Path) -> None:
    for name in ("rate-0.30", "rate-0.50", "teacher"):
        save_fresh(tmp_path / name, seed=name == "teacher")
    (tmp_path / "rate-0.30" / "dies").touch()
    events: list[FinetuneProgress] = []

    results = finetune(tmp_path, load_subnet=load_mortal, on_epoch=events.append)

    assert not (tmp_path / "rate-0.30" / "dies").exists()
    assert epochs_by_rate(events) == {0.3: [1, 2, 3], 0.5: [1, 2, 3]}
    weights = read_finetuned(tmp_path / "rate-0.30")
    assert_same(weights, read_finetuned(tmp_path / "rate-0.50"))
    assert results[0.3].test_loss == results[0.5].test_loss


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_a_checkpoint_that_is_gone_is_trained_again_to_the_same_weights(tmp_path: Path) -> None:
    """A driver that is killed at the wrong moment leaves the name of one."""
    for name in ("rate-0.30", "rate-0.50", "teacher"):
        save_fresh(tmp_path / name, seed=name == "teacher")
    finetune(tmp_path)
    weights = read_finetuned(tmp_path / "rate-0.30")
    (tmp_path / "finetune" / "chosen.json").unlink()
    for checkpoint in (tmp_path / "finetune" / "rate-0.3").glob("checkpoint_*"):
        shutil.rmtree(checkpoint)
    events: list[FinetuneProgress] = []
    finetune(tmp_path, resume=True, on_epoch=events.append)
    assert epochs_by_rate(events) == {0.3: [1, 2, 3], 0.5: [1, 2, 3]}
    assert_same(weights, read_finetuned(tmp_path / "rate-0.30"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_after_a_killed_trial_and_a_killed_driver_all_end_with_the_same_weights(
    tmp_path: Path,
) -> None:
    recipe = Recipe(epochs=6, batch_size=16, lr=0.05, padding=1, seed=5)
    whole = save_fresh(tmp_path / "rate-0.30")
    save_fresh(tmp_path / "rate-0.50")
    driver = (
        "from pathlib import Path\n"
        "from cacp_ray.distributed import cluster\n"
        "from cacp_ray.training.recipe import Recipe\n"
        "from tests.ray.test_finetune import finetune, load_slow\n"
        "cluster.connect('local', num_cpus=2)\n"
        "def show(progress):\n"
        "    print(progress.rate, progress.epoch, flush=True)\n"
        f"finetune(Path({str(tmp_path)!r}), load_subnet=load_slow, recipe={recipe!r},\n"
        "    on_epoch=show)\n"
    )
    command = [sys.executable, "-c", driver]
    seen: dict[float, list[int]] = {0.3: [], 0.5: []}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None

        def wait_for(rate: float, epoch: int) -> None:
            while epoch not in seen[rate]:
                line = process.stdout.readline().split()
                assert line, "the driver ended by itself"
                seen[float(line[0])].append(int(line[1]))
            time.sleep(EPOCH_SECONDS / 2)  # amid the next epoch

        wait_for(0.3, 1)
        pid = int((tmp_path / "rate-0.30" / "pid").read_text())
        os.kill(pid, signal.SIGKILL)
        wait_for(0.3, 3)
        assert int((tmp_path / "rate-0.30" / "pid").read_text()) != pid
        process.send_signal(signal.SIGKILL)
        for line in process.stdout:
            seen[float(line.split()[0])].append(int(line.split()[1]))
    assert seen[0.3] == list(range(1, len(seen[0.3]) + 1)), "the killed trial repeated an epoch"

    events: list[FinetuneProgress] = []
    results = finetune(
        tmp_path, load_subnet=load_slow, recipe=recipe, resume=True, on_epoch=events.append
    )

    assert list(results) == [0.3, 0.5]
    restored = [event for event in events if event.is_restored]
    # Tune saved last with the last epoch or, within a second of it, with the one before.
    for event in restored:
        assert event.epoch in (seen[event.rate][-1] - 1, seen[event.rate][-1])
    assert {event.rate for event in restored} == {0.3, 0.5}
    assert events[: len(restored)] == restored
    again = epochs_by_rate(events)
    assert again[0.3][-1] == recipe.epochs
    for rate, before in seen.items():
        both = before + again.get(rate, [])
        assert set(both) == set(range(1, recipe.epochs + 1))
        assert len(both) <= recipe.epochs + 1, f"rate {rate} repeated more than one epoch"
    assert_same(read_finetuned(tmp_path / "rate-0.30"), read_finetuned(tmp_path / "rate-0.50"))
    torch.set_num_threads(1)
    weights = [copy.deepcopy(whole.state_dict())]
    train(
        whole,
        make_batches(SPLITS["train_split"], recipe),
        SPLITS["search_split"],
        recipe,
        on_epoch=lambda result, state: weights.append(copy.deepcopy(state["model"])),
    )
    assert_same(read_finetuned(tmp_path / "rate-0.30"), weights[results[0.3].best_epoch])


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_that_always_fails_is_named_with_its_reason_and_can_be_resumed(
    tmp_path: Path,
) -> None:
    with pytest.raises(EvaluationError, match=r"rate-0\.3 failed 3 times \(.*no subnet here"):
        finetune(tmp_path, load_subnet=load_missing, rates=(0.3,))
    for name in ("rate-0.30", "teacher"):
        save_fresh(tmp_path / name)
    events: list[FinetuneProgress] = []
    finetune(tmp_path, rates=(0.3,), resume=True, on_epoch=events.append)
    assert epochs_by_rate(events) == {0.3: [1, 2, 3]}


def test_an_experiment_is_not_overwritten_or_continued_for_something_else(tmp_path: Path) -> None:
    file = tmp_path / "finetune" / "finetune.json"
    file.parent.mkdir()
    file.write_text('{"rates": [0.3], "recipes": {"": {}}}')
    with pytest.raises(ArtifactError, match="--resume"):
        finetune(tmp_path)
    with pytest.raises(ConfigError, match=r"other settings \(rates, recipes\.batch_size, "):
        finetune(tmp_path, resume=True)


@pytest.mark.usefixtures("ray_cluster")
def test_training_that_diverged_leaves_the_subnet_as_it_was(tmp_path: Path) -> None:
    save_fresh(tmp_path / "rate-0.30")
    recipe = dataclasses.replace(RECIPE, distillation=0.0, lr=1e30)
    (result,) = finetune(tmp_path, rates=(0.3,), recipe=recipe).values()
    assert result.best_epoch == 0
    assert result.search_score == result.search_score_before
    metrics = json.loads((tmp_path / "rate-0.30" / "metrics.json").read_text())
    assert [row["epoch"] for row in metrics["history"]] == [1, 2, 3]
    assert metrics["history"][-1]["train_loss"] is None  # JSON has no NaN


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_the_best_variant_by_search_accuracy_is_kept(tmp_path: Path) -> None:
    save_fresh(tmp_path / "rate-0.30")
    idle = Recipe(epochs=2, batch_size=16, lr=1e-9, padding=1)
    able = Recipe(epochs=3, batch_size=16, lr=0.1, padding=1, optimizer="adamw", ema=0.5)
    events: list[FinetuneProgress] = []

    results = finetune(
        tmp_path,
        rates=(0.3,),
        recipes={"idle": idle, "able": able},
        on_epoch=events.append,
        loggers=("csv", "json", "tensorboard"),
    )

    assert {(e.variant, e.epoch, e.epochs) for e in events} == {
        *(("idle", epoch, 2) for epoch in (1, 2)),
        *(("able", epoch, 3) for epoch in (1, 2, 3)),
    }
    best = {
        name: max(e.search_score for e in events if e.variant == name) for name in ("idle", "able")
    }
    assert best["able"] > best["idle"]
    assert results[0.3].variant == "able"
    assert results[0.3].search_score == best["able"]
    metrics = json.loads((tmp_path / "rate-0.30" / "metrics.json").read_text())
    assert (metrics["variant"], metrics["recipe"]["optimizer"]) == ("able", "adamw")
    trial = tmp_path / "finetune" / "rate-0.3-able"
    assert len((trial / "progress.csv").read_text().splitlines()) == 1 + 3
    assert len((trial / "result.json").read_text().splitlines()) == 3
    assert list(trial.glob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_worse_variants_of_each_rate_stop_and_never_a_rate_for_another(tmp_path: Path) -> None:
    save_fresh(tmp_path / "rate-0.30")
    trained = save_trained(tmp_path / "rate-0.50")
    write_tensors(tmp_path / "teacher" / "model.safetensors", trained.state_dict())
    still = dataclasses.replace(RECIPE, epochs=6, lr=1e-9)
    recipes = {"learns": dataclasses.replace(RECIPE, epochs=6), "still": still}

    results = finetune(tmp_path, recipes=recipes, rates=(0.5, 0.3), stops_poor=True)

    assert {rate: result.epochs for rate, result in results.items()} == {0.5: 6, 0.3: 6}
    metrics = json.loads((tmp_path / "rate-0.30" / "metrics.json").read_text())
    assert metrics["variants"]["learns"]["epochs"] == 6
    assert metrics["variants"]["still"]["epochs"] < 6


class Interrupted(Exception):
    pass


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_variants_of_a_restored_experiment_are_compared_with_those_that_had_ended(
    tmp_path: Path,
) -> None:
    root = tmp_path / "before"
    save_fresh(root / "rate-0.30")
    trained = save_trained(root / "teacher")
    write_tensors(root / "teacher" / "model.safetensors", trained.state_dict())
    still = dataclasses.replace(RECIPE, epochs=6, lr=1e-9)
    recipes = {"learns": dataclasses.replace(RECIPE, epochs=6), "still": still}

    def interrupt(progress: FinetuneProgress) -> None:
        if progress.variant == "still":
            raise Interrupted

    # Trials run one after another: each takes both CPUs.
    options: dict[str, Any] = {"rates": (0.3,), "cpus": 2, "load_subnet": load_slow}
    with pytest.raises(ray.tune.TuneError, match="Interrupted"):
        finetune(root, recipes=recipes, stops_poor=True, on_epoch=interrupt, **options)
    root = root.rename(tmp_path / "moved")
    with (root / "finetune" / "asha.jsonl").open("a") as journal:
        journal.write('{"trial": "cut sho')
    events: list[FinetuneProgress] = []
    finetune(root, recipes=recipes, stops_poor=True, resume=True, on_epoch=events.append, **options)
    assert not [e for e in events if e.variant == "learns" and not e.is_restored]
    metrics = json.loads((root / "rate-0.30" / "metrics.json").read_text())
    assert metrics["variants"]["learns"]["epochs"] == 6
    assert metrics["variants"]["still"]["epochs"] == 2  # the first rung


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_two_workers_train_one_model_as_one_worker_does(tmp_path: Path) -> None:
    # BN is left out, whose statistics are each worker's own; crops and flips change nothing.
    split = SPLITS["train_split"]
    alike = dataclasses.replace(split, images=split.images[:, :, :1].repeat(8, axis=2))
    recipe = Recipe(epochs=3, batch_size=16, lr=0.05, padding=0, seed=5, clip_norm=1.0)
    kept: list[dict[str, Tensor]] = []
    for workers in (1, 2):
        root = tmp_path / f"{workers}"
        save_fresh(root / "rate-0.30")
        events: list[FinetuneProgress] = []
        (result,) = finetune(
            root,
            load_subnet=load_without_norm,
            rates=(0.3,),
            recipe=recipe,
            workers=workers,
            train_split=alike,
            on_epoch=events.append,
        ).values()
        assert epochs_by_rate(events) == {0.3: [1, 2, 3]}
        assert (result.best_epoch > 0, result.test_images) == (True, TEST_IMAGES)
        kept.append(read_finetuned(root / "rate-0.30"))
    before = load_without_norm(tmp_path / "1" / "rate-0.30").state_dict()
    for key, value in kept[0].items():
        moved = (value - before[key]).abs().max()
        assert moved > 0
        assert (value - kept[1][key]).abs().max() < 0.1 * moved


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.slow
def test_workers_of_trials_that_died_or_were_stopped_make_room(tmp_path: Path) -> None:
    """Each trial takes the whole machine, so all need what dead and stopped trials had."""
    save_fresh(tmp_path / "rate-0.30")
    recipe = dataclasses.replace(RECIPE, distillation=0.0)
    killed: list[int] = []

    def kill_all_once(progress: FinetuneProgress) -> None:
        if not killed and progress.epoch == 2:
            alive = [actor for actor in actors().values() if actor["State"] == "ALIVE"]
            killed.extend(a["Pid"] for a in alive if a["ActorClassName"].endswith("ImplicitFunc"))
            for pid in killed:
                os.kill(pid, signal.SIGKILL)

    finetune(
        tmp_path,
        load_subnet=load_slow,
        rates=(0.3,),
        recipes={"first": recipe, "second": dataclasses.replace(recipe, seed=6)},
        workers=2,
        stops_poor=True,
        on_epoch=kill_all_once,
    )
    assert killed
    metrics = json.loads((tmp_path / "rate-0.30" / "metrics.json").read_text())
    assert max(variant["epochs"] for variant in metrics["variants"].values()) == 3
    assert set(metrics["variants"]) == {"first", "second"}


ELASTIC = """
import sys, threading, time
from pathlib import Path
import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster
from cacp_ray.training.recipe import Recipe
from tests.ray.test_finetune import finetune, load_slow

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
recipe = Recipe(epochs=6, batch_size=16, lr=0.05, padding=1, seed=5)
lost_nodes = []

def watch(progress):
    if progress.epoch == 2:
        (trial,) = (
            actor["Address"]["NodeID"]
            for actor in actors().values()
            if actor["ActorClassName"].endswith("ImplicitFunc") and actor["State"] == "ALIVE"
        )
        (lost,) = (node for node in nodes if (node.node_id == trial) == (sys.argv[2] == "own"))
        if not lost_nodes:
            lost_nodes.append(lost)
            threading.Thread(target=cluster.remove_node, args=(lost,)).start()

finetune(Path(sys.argv[1]), load_subnet=load_slow, rates=(0.3,), recipe=recipe, workers=(1, 2),
    on_epoch=watch)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["a worker's", "own"])
def test_training_goes_on_with_fewer_workers_when_a_node_is_lost(tmp_path: Path, lost: str) -> None:
    save_fresh(tmp_path / "rate-0.30")
    done = subprocess.run(
        [sys.executable, "-c", ELASTIC, str(tmp_path), lost],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / "rate-0.30" / "metrics.json").read_text())["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3, 4, 5, 6]
    workers = [row["workers"] for row in history]
    assert (workers[0], workers[-1]) == (2, 1)
    assert workers == sorted(workers, reverse=True)


def load_without_norm(folder: Path) -> nn.Sequential:
    model = load_model(folder)
    assert isinstance(model, nn.Sequential)
    model[1] = nn.Identity()
    return model


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_logger_that_is_not_installed_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"pip install {name}"):
        finetune(tmp_path, loggers=(name,))
    assert not (tmp_path / "finetune").exists()
