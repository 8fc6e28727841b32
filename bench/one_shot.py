"""Accuracy before any fine-tuning, for every criterion and recovery at three rates.

python bench/one_shot.py --model resnet20 --weights embedded:resnet20_cifar10 \
    --train TRAIN.parquet --train-rows 0:45000 --search TRAIN.parquet --search-rows 45000:50000

Widths are uniform, over all groups and over the inner ones with residual streams whole. Statistics
are collected once and shared by all criteria. Each result becomes a line of --log at once: the same
command continues a run that was killed, and another --model adds its rows to the same file.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from experiment import GROUP_SETS, RATES, load, make_parser, widths
from report import append_row, print_environment, print_table, read_rows
from torch import nn

from cacp_ray.data.images import ImageSet, read_parquet
from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.preparation import Prepared, prepare
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.criteria import CRITERIA, needs, rank_channels
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import Statistics, collect_statistics
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.training.metrics import fast_dtype, measure

RECOVERIES = ("none", "bn", "compensate")


def prepare_all(
    model: nn.Module,
    plan: Plan,
    calibration: ImageSet,
    statistics: Statistics,
    name: str,
    seed: int,
) -> Iterator[tuple[str, Prepared]]:
    """Yields each recovery with what its candidates share, in a criterion's order."""
    tensors = all_tensors(model)
    orders = rank_channels(name, plan, tensors, statistics, seed)
    for recovery in RECOVERIES:
        yield (
            recovery,
            prepare(
                model,
                plan,
                calibration,
                statistics,
                criterion=name,
                recovery=recovery,
                seed=seed,
                orders=orders,
            ),
        )


def list_cells(options: argparse.Namespace, num_images: int) -> list[dict[str, Any]]:
    """The cells of the tables; a cell in the log is not measured again."""
    common = {
        "model": options.model,
        "weights": Path(options.weights).stem,
        "dtype": options.dtype,
        "images": num_images,
        "calibration": options.calibration,
        "seed": options.seed,
    }
    return [
        {**common, "criterion": criterion, "recovery": recovery, "groups": groups, "rate": rate}
        for criterion in options.criteria
        for recovery in RECOVERIES
        for groups in GROUP_SETS
        for rate in RATES
    ]


def score_missing(options: argparse.Namespace, model: nn.Module, search: ImageSet) -> None:
    """Measures what the log lacks, criterion by criterion."""
    done = [row["cell"] for row in read_rows(options.log)]
    missing = [cell for cell in list_cells(options, len(search)) if cell not in done]
    if not missing:
        return
    train = read_parquet(options.train, options.train_rows, options.calibration)
    images, labels = train.tensors()
    plan = make_plan(model, images[:1])
    whole = int(plan.macs(plan.cost_model.num_channels))
    counts = {groups: widths(plan, groups) for groups in GROUP_SETS}
    kinds = {"inputs"}.union(*(needs(name) for name in options.criteria))
    statistics = collect_statistics(
        model, plan, image_batches(images, labels), seed=options.seed, kinds=kinds
    )
    for criterion in dict.fromkeys(cell["criterion"] for cell in missing):
        shared = prepare_all(model, plan, train, statistics, criterion, options.seed)
        for recovery, prepared in shared:
            score = Scorer(prepared, search, recovery=recovery, batch_size=250, dtype=options.dtype)
            for cell in missing:
                if (cell["criterion"], cell["recovery"]) == (criterion, recovery):
                    keep = tuple(counts[cell["groups"]][RATES.index(cell["rate"])].tolist())
                    scored = score(Candidate(cell["rate"], keep, index=0))
                    figures = {"top1": scored.score, "loss": scored.loss, "seconds": scored.seconds}
                    kept = int(plan.macs(keep)) / whole
                    append_row(options.log, {"cell": cell, "macs_kept": kept, **figures})


def print_results(options: argparse.Namespace, base: float, num_images: int) -> None:
    """Prints a table for each group set; the best of a column is bold."""
    rows = read_rows(options.log)
    cells = list_cells(options, num_images)
    top1 = {
        tuple(row["cell"][key] for key in ("groups", "criterion", "recovery", "rate")): row["top1"]
        for row in rows
        if row["cell"] in cells
    }
    columns = [(recovery, rate) for recovery in RECOVERIES for rate in RATES]
    header = ["criterion", *(f"{recovery} {rate}" for recovery, rate in columns)]
    for groups in GROUP_SETS:
        best = [max(top1[groups, name, *column] for name in options.criteria) for column in columns]
        table = []
        for name in options.criteria:
            values = [top1[groups, name, *column] for column in columns]
            texts = [f"{100 * value:.1f}" for value in values]
            is_best = [value == highest for value, highest in zip(values, best, strict=True)]
            bold = [f"**{text}**" if b else text for text, b in zip(texts, is_best, strict=True)]
            table.append([name, *bold])
        title = (
            f"{options.model}, {groups} groups: top-1 % on {num_images} search images without "
            f"fine-tuning, by recovery and share of MACs kept (base {100 * base:.1f} %, "
            f"{options.calibration} calibration images, {options.dtype})"
        )
        print_table(title, header, table)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--calibration", type=int, default=1000, help="training images")
    parser.add_argument("--criteria", nargs="+", default=list(CRITERIA), choices=list(CRITERIA))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="by default the fast one")
    parser.add_argument("--log", type=Path, default=Path("one_shot.jsonl"))
    options = parser.parse_args()
    fast = fast_dtype()
    options.dtype = options.dtype or str(fast).removeprefix("torch.")
    model, search = load(options)
    score_missing(options, model, search)
    base = measure(model, *search.tensors(), dtype=getattr(torch, options.dtype)).top1
    print_results(options, base, len(search))
    print_environment(options.seed)


if __name__ == "__main__":
    main()
