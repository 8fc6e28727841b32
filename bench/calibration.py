"""How many images compensation needs, and what the same accuracy costs by fine-tuning.

python bench/calibration.py --model resnet20 --weights embedded:resnet20_cifar10 \
    --train TRAIN.parquet --train-rows 0:45000 --search TRAIN.parquet --search-rows 45000:50000

CaP (arXiv 2108.13728) claims to need 90 % fewer images and 95 % less time than methods that train.
This script measures, with the `cap` order, uniform widths and the same channels kept:
1. accuracy of `compensate` by number of calibration images;
2. seconds of compensation (statistics, order, factors, solving) against seconds of training. The
   training starts from the subnet that was only cut and ends when it is as accurate on the search
   split. It may choose the best of several learning rates afterwards, sees all training images, and
   is not charged for the checks; it is given up after --max-steps.
Seconds are processor time on one thread. Each result becomes a line of --log at once, so the same
command continues a run that was killed.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import GROUP_SETS, RATES, load, make_parser, widths
from report import append_row, print_environment, print_table, read_rows
from torch import nn

from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.evaluation.preparation import CutNetwork, Prepared, prepare
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.pruning.surgery import Cutter
from cacp_ray.training.loop import make_batches, make_optimizer, train_epoch
from cacp_ray.training.metrics import fast_dtype, measure
from cacp_ray.training.recipe import Recipe


def read_calibration(options: argparse.Namespace, count: int) -> ImageSet:
    """`count` training images, evenly spaced."""
    return read_parquet(options.train, options.train_rows, count)


def prepare_timed(
    model: nn.Module, plan: Plan, calibration: ImageSet, seed: int
) -> tuple[Prepared, float]:
    """What compensated candidates share, and the seconds that preparing it took."""
    started = time.process_time()
    images, _ = calibration.tensors()
    statistics = collect_statistics(model, plan, image_batches(images), seed=seed)
    prepared = prepare(
        model, plan, calibration, statistics, criterion="cap", recovery="compensate", seed=seed
    )
    return prepared, time.process_time() - started


def compensate(options: argparse.Namespace, model: nn.Module, search: ImageSet) -> None:
    """Logs accuracy and seconds by number of calibration images, group set and rate."""
    x, y = search.tensors()
    plan = make_plan(model, x[:1])
    for count in options.calibration:
        cells = [
            {**common(options, len(x)), "calibration": count, "groups": groups, "rate": rate}
            for groups in GROUP_SETS
            for rate in RATES
        ]
        missing = without_done(options, cells)
        if not missing:
            continue
        calibration = read_calibration(options, count)
        prepared, shared_s = prepare_timed(model, plan, calibration, options.seed)
        for cell in missing:
            keep = widths(plan, cell["groups"])[RATES.index(cell["rate"])].tolist()
            cut_network = CutNetwork(prepared, "compensate")
            started = time.process_time()
            small = cut_network.load(keep)
            seconds = shared_s + time.process_time() - started
            top1 = measure(small, x, y, dtype=fast_dtype()).top1
            append_row(options.log, {"cell": cell, "top1": top1, "seconds": seconds})


def race(options: argparse.Namespace, model: nn.Module, search: ImageSet) -> None:
    """Trains the cut networks until they are as accurate, once with each learning rate."""
    x, y = search.tensors()
    plan = make_plan(model, x[:1])
    cells = [
        {**common(options, len(x)), "groups": groups, "rate": rate, "lr": lr, **limits(options)}
        for groups in GROUP_SETS
        for rate in RATES
        for lr in options.lr
    ]
    missing = without_done(options, cells)
    if not missing:
        return
    calibration = read_calibration(options, options.race_calibration)
    prepared, _ = prepare_timed(model, plan, calibration, options.seed)
    tensors = {name: torch.from_numpy(value) for name, value in prepared.tensors.items()}
    train_split = read_parquet(options.train, options.train_rows)
    targets = compensated(options, len(x))
    for cell in missing:
        keep = widths(plan, cell["groups"])[RATES.index(cell["rate"])].tolist()
        small = build_subnet(model, tensors | Cutter(plan)(tensors, keep))
        target = targets[options.race_calibration, cell["groups"], cell["rate"]]["top1"]
        figures = train_until(small, target, cell["lr"], train_split, (x, y), options)
        append_row(options.log, {"cell": cell, "target": target, **figures})


def train_until(
    model: nn.Module,
    target: float,
    lr: float,
    train_split: ImageSet,
    search_split: tuple[torch.Tensor, torch.Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Steps and seconds of training to the target accuracy, or to --max-steps."""
    every = options.check_every
    recipe = Recipe(epochs=options.max_steps // every, lr=lr, warmup=0, seed=options.seed)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = make_optimizer(model, recipe)
    rng = np.random.default_rng(options.seed)
    before = top1 = measure(model, *search_split, dtype=fast_dtype()).top1
    steps, seconds = 0, 0.0
    for part in range(recipe.epochs):
        if top1 >= target:
            break
        chosen = rng.integers(len(train_split), size=every * recipe.batch_size)
        batches = make_batches(train_split.at(chosen), recipe)
        started = time.process_time()
        train_epoch(model, optimizer, batches, recipe, part)
        seconds += time.process_time() - started
        steps += every
        top1 = measure(model, *search_split, dtype=fast_dtype()).top1
    return {
        "before": before,
        "top1": top1,
        "steps": steps,
        "images": steps * recipe.batch_size,
        "seconds": seconds,
        "reached": top1 >= target,
    }


def common(options: argparse.Namespace, num_images: int) -> dict[str, Any]:
    """The part of a cell that all results of a run share."""
    return {
        "model": options.model,
        "weights": Path(options.weights).stem,
        "images": num_images,
        "seed": options.seed,
    }


def limits(options: argparse.Namespace) -> dict[str, Any]:
    """The part of a cell that limits a race."""
    return {
        "race_calibration": options.race_calibration,
        "check_every": options.check_every,
        "max_steps": options.max_steps,
    }


def without_done(options: argparse.Namespace, cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cells without a result in the log."""
    done = [row["cell"] for row in read_rows(options.log)]
    return [cell for cell in cells if cell not in done]


def compensated(
    options: argparse.Namespace, num_images: int
) -> dict[tuple[int, str, float], dict[str, Any]]:
    """Results of `compensate` by calibration images, group set and rate."""
    shared = common(options, num_images)
    return {
        (cell["calibration"], cell["groups"], cell["rate"]): row
        for row in read_rows(options.log)
        if "calibration" in (cell := row["cell"]) and shared.items() <= cell.items()
    }


def print_compensation(options: argparse.Namespace, base: float, num_images: int) -> None:
    """Accuracy by calibration images."""
    results = compensated(options, num_images)
    table = []
    for count in options.calibration:
        rows = [results[count, groups, rate] for groups in GROUP_SETS for rate in RATES]
        seconds = np.median([row["seconds"] for row in rows])
        accuracies = [f"{100 * row['top1']:.1f}" for row in rows]
        table.append([f"{count:,}", *accuracies, f"{seconds:.1f}"])
    header = ["calibration images"]
    header += [f"{groups} groups, {rate}" for groups in GROUP_SETS for rate in RATES]
    title = (
        f"{options.model}: top-1 % on {num_images} search images after `cap` and `compensate`, by "
        f"share of MACs kept (base {100 * base:.1f} %)"
    )
    print_table(title, [*header, "seconds"], table)


def print_race(options: argparse.Namespace, num_images: int) -> None:
    """The fastest learning rate of each race against compensation."""
    shared = common(options, num_images) | limits(options)
    races = [row for row in read_rows(options.log) if shared.items() <= row["cell"].items()]
    results = compensated(options, num_images)
    table = []
    for groups in GROUP_SETS:
        for rate in RATES:
            own = [r for r in races if (r["cell"]["groups"], r["cell"]["rate"]) == (groups, rate)]
            fastest = min(own, key=lambda row: (not row["reached"], row["seconds"], -row["top1"]))
            ours = results[options.race_calibration, groups, rate]
            ratio = f"{fastest['seconds'] / ours['seconds']:.1f}x"
            table.append(
                [
                    f"{groups}, {rate}",
                    f"{100 * fastest['before']:.1f}",
                    f"{100 * fastest['target']:.1f}",
                    f"{ours['seconds']:.1f}",
                    f"{fastest['seconds']:.1f}",
                    f"{fastest['images']:,} (lr {fastest['cell']['lr']:g})",
                    ratio
                    if fastest["reached"]
                    else f"over {ratio}: given up at {100 * fastest['top1']:.1f} %",
                ]
            )
    header = ["groups, rate", "cut only, %", "compensated, %", "compensation, s", "training, s"]
    title = (
        f"{options.model}: training to the accuracy of compensation "
        f"({options.race_calibration:,} calibration images; checked every "
        f"{options.check_every} steps of 128 images, at most {options.max_steps})"
    )
    print_table(title, [*header, "images trained on", "time of training"], table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--calibration", type=int, nargs="+", default=[100, 500, 1000, 5000])
    parser.add_argument("--race-calibration", type=int, default=1000, help="one of --calibration")
    parser.add_argument("--lr", type=float, nargs="+", default=[0.01, 0.03, 0.1])
    parser.add_argument("--check-every", type=int, default=10, help="training steps")
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--log", type=Path, default=Path("calibration.jsonl"))
    options = parser.parse_args()
    if options.race_calibration not in options.calibration:
        parser.error("--race-calibration must be one of --calibration")
    model, search = load(options)
    compensate(options, model, search)
    race(options, model, search)
    base = measure(model, *search.tensors(), dtype=fast_dtype()).top1
    print_compensation(options, base, len(search))
    print_race(options, len(search))
    print_environment(options.seed)


if __name__ == "__main__":
    main()
