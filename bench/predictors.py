"""What predicts the accuracy of a trained subnet: python bench/predictors.py --out OUT.

At every rate, subnets of very different widths (uniform over all groups, over the inner ones, and
random ones around both) are measured in all the ways that a search could choose by, then trained by
one recipe. Kendall's tau says how well each measurement ranks the trained accuracies:

- at once: repaired by compensation at once; top-1, and minus the loss;
- layer by layer: repaired layer by layer, as the saved subnets are;
- batch norm: statistics estimated anew, without another repair;
- K steps: after K training steps of a schedule of their own, from the layer-by-layer repair;
- from the trained: cut from a trained subnet of the next larger rate and repaired at once. Widths
  above those of that subnet are cut to them, so these are other widths; how many differ is printed.

Some subnets are trained with a second seed, whose differences are the noise of the ranking. Each
result becomes a line of OUT/log.jsonl at once, and the same command goes on after a stop. Options
as in bench/finetune.py; the recipe is --epochs passes of --train-rows at --lr.
"""

import argparse
import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import make_data_parser, run_values
from report import append_row, print_environment, print_table, read_rows
from scipy.stats import kendalltau
from torch import nn

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.data.images import ImageSet
from cacp_ray.pruning.subnet import save_subnet
from cacp_ray.rundir.finetuned import save_finetuned
from cacp_ray.searching.budget import Ints, spend, uniform
from cacp_ray.training.loop import make_batches, train
from cacp_ray.training.metrics import Accuracy, fast_dtype, measure_split
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.ladder import open_cuts, read_rung
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits
from cacp_ray.workflows.winners import build_here, describe_subnet

STEPS = (50, 100, 200)
BATCH = 128


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    values = {
        "name": "predictors", **run_values(options), "rates": [*options.rates, options.larger],
    }  # fmt: skip
    setup = Setup.create(load_config(RunConfig, values)).prepare()
    images = Splits(setup.config.data).read("train")
    log = options.out / "log.jsonl"
    for rate in options.rates:
        for index, counts in enumerate(draw_widths(setup, rate, options.subnets)):
            measure_subnet(setup, images, rate, index, counts, log, options)
    print_results(read_rows(log), options)
    print_environment(0)


def parse_options() -> argparse.Namespace:
    parser = make_data_parser(__doc__ or "")
    parser.add_argument("--test", default="embedded:test", help="Parquet of test images")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--larger", type=float, default=0.7, help="rate that is trained first")
    parser.add_argument("--subnets", type=int, default=16)
    parser.add_argument("--repeated", type=int, default=4, help="subnets trained with two seeds")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def draw_widths(setup: Setup, rate: float, number: int) -> Ints:
    """(number, G) keep counts that spend the budget: two uniform ones, and draws around them."""
    budget, rng = setup.budget, np.random.default_rng(round(1000 * rate))
    inner = [0.0 if group.is_residual else 1.0 for group in setup.plan.groups]
    rows = [uniform(budget, [rate], np.ones(len(inner)))[0]]
    if budget.limit(rate) >= budget.cost(np.where(inner, budget.min_counts, budget.num_channels)):
        rows.append(uniform(budget, [rate], np.array(inner))[0])
    starts = np.array(rows, dtype=np.float64)
    while len(rows) < number:
        start = starts[len(rows) % len(starts)]
        desired = np.minimum(start * rng.lognormal(0, 0.4, len(start)), budget.num_channels)
        rows.append(spend(budget, desired[None], [rate])[0])
    return np.array(rows[:number])


def measure_subnet(
    setup: Setup,
    images: ImageSet,
    rate: float,
    index: int,
    counts: Ints,
    log: Path,
    options: argparse.Namespace,
) -> None:
    """Adds what is missing of one subnet to the log."""
    known = {
        (row["what"], row["seed"])
        for row in read_rows(log)
        if (row["rate"], row["index"]) == (rate, index)
    }

    def note(what: str, accuracy: Accuracy, seed: int = 0, **others: Any) -> None:
        row = {"rate": rate, "index": index, "what": what, "seed": seed, **others}
        append_row(log, row | {"top1": accuracy.top1, "loss": accuracy.loss})
        print(f"{rate} {index} {what} {seed}: {100 * accuracy.top1:.2f}", flush=True)

    whole, net = setup.model, None
    for what, pruning in (
        ("batch norm", {"recovery": "bn", "sequential": False}),
        ("at once", {"sequential": False}),
        ("layer by layer", {}),
    ):
        wanted = what == "layer by layer" or (what, 0) not in known
        if wanted:
            net = build(setup, counts, pruning)
            if (what, 0) not in known:
                note(what, accuracy_of(net, setup.search))
    assert net is not None
    if ("from the trained", 0) not in known:
        cut = open_cuts(setup, read_rung(train_larger(setup, images, options)))(rate, counts)
        moved = int((np.array(cut.description["keep_counts"]) != counts).sum())
        note("from the trained", accuracy_of(cut.net, setup.search), moved=moved)
    for steps in STEPS:
        if (f"{steps} steps", 0) not in known:
            few = images.take(steps * BATCH)
            trained = trained_copy(net, whole, few, setup.search, Recipe(epochs=1, lr=options.lr))
            note(f"{steps} steps", accuracy_of(trained, setup.search))
    for seed in range(2 if index < options.repeated else 1):
        if ("trained", seed) not in known:
            recipe = Recipe(epochs=options.epochs, lr=options.lr, seed=seed)
            trained = trained_copy(net, whole, images, setup.search, recipe)
            note("trained", accuracy_of(trained, setup.search), seed)


def build(setup: Setup, counts: Ints, pruning: dict[str, Any]) -> nn.Module:
    """A cut network, repaired as these settings say."""
    config = setup.config
    changed = config.model_copy(update={"pruning": config.pruning.model_copy(update=pruning)})
    (built,) = build_here(replace(setup, config=changed))([(tuple(counts.tolist()), "")])
    return built.net


def accuracy_of(net: nn.Module, search: ImageSet) -> Accuracy:
    return measure_split(net, search, dtype=fast_dtype())


def trained_copy(
    net: nn.Module, teacher: nn.Module, images: ImageSet, search: ImageSet, recipe: Recipe
) -> nn.Module:
    """The network after a training on soft labels of the whole one."""
    net, recipe = copy.deepcopy(net), replace(recipe, distillation=0.7, label_smoothing=0.0)
    batches = make_batches(images, recipe)
    train(net, batches, search, recipe, teacher=copy.deepcopy(teacher))
    return net.eval()


def train_larger(setup: Setup, images: ImageSet, options: argparse.Namespace) -> Path:
    """Folder of the trained subnet of uniform widths at the larger rate; trained once."""
    folder, rate = options.out / f"rate-{options.larger:g}", options.larger
    if (folder / "finetuned.safetensors").exists():
        return folder
    counts = uniform(setup.budget, [rate], np.ones(len(setup.plan.groups)))[0]
    (built,) = build_here(setup)([(tuple(counts.tolist()), "")])
    facts = {
        "rate": rate,
        "cost_kept": float(setup.budget.cost(counts)) / setup.budget.total,
        "keep_counts": counts.tolist(),
        "macs": int(setup.plan.macs(counts)),
        "params": int(setup.plan.params(counts)),
    }
    description = describe_subnet(setup, facts, setup.prepared.orders, "cap", built)
    recipe = Recipe(epochs=options.epochs, lr=options.lr)
    trained = trained_copy(built.net, setup.model, images, setup.search, recipe)
    save_subnet(folder, built.net, description)
    save_finetuned(folder, trained, {"score": accuracy_of(trained, setup.search).top1})
    return folder


def print_results(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    table = []
    for rate in options.rates:
        own = [row for row in rows if row["rate"] == rate]
        final = by_index(own, "trained")
        table += [
            [f"{rate:g}", what, *describe_tau(by_index(own, name, key), final)]
            for name, key, what in list_predictors()
        ]
        second = by_index(own, "trained", seed=1)
        pairs = np.array([[final[i], second[i]] for i in second])
        noise = np.sqrt(np.square(pairs[:, 0] - pairs[:, 1]).mean() / 2) if len(pairs) else np.nan
        values = 100 * np.array(list(final.values()))
        print(
            f"\nRate {rate:g}: {len(values)} trained subnets, {values.min():.2f} to "
            f"{values.max():.2f} %, standard deviation {values.std(ddof=1):.2f}; of a second seed "
            f"{100 * noise:.2f} ({len(pairs)} pairs)."
        )
    header = ["rate", "measured", "subnets", "Kendall's tau", "p", "best by it, points below best"]
    print_table("What ranks trained subnets", header, table)


def list_predictors() -> Iterator[tuple[str, str, str]]:
    for name in ("batch norm", "at once", "layer by layer", "from the trained"):
        yield name, "top1", f"{name}, top-1"
        yield name, "loss", f"{name}, loss"
    for steps in STEPS:
        yield f"{steps} steps", "top1", f"{steps} steps, top-1"


def by_index(
    rows: list[dict[str, Any]], what: str, key: str = "top1", seed: int = 0
) -> dict[int, float]:
    """Values by subnet; a loss is negated, so that more is better."""
    sign = -1.0 if key == "loss" else 1.0
    return {
        row["index"]: sign * row[key] for row in rows if (row["what"], row["seed"]) == (what, seed)
    }


def describe_tau(values: dict[int, float], final: dict[int, float]) -> list[str]:
    """Number of subnets, tau with its p value, and what the choice by the values loses."""
    shared = sorted(values.keys() & final.keys())
    if len(shared) < 3:
        return [str(len(shared)), "", "", ""]
    x, y = [values[i] for i in shared], [final[i] for i in shared]
    tau = kendalltau(x, y)
    lost = 100 * (max(y) - y[int(np.argmax(x))])
    return [str(len(shared)), f"{tau.statistic:.2f}", f"{tau.pvalue:.3f}", f"{lost:.2f}"]


if __name__ == "__main__":
    main()
