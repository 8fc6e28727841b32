"""Fine-tuned accuracy of searched, random and uniform subnets: python bench/finetune.py --out DIR.

For every seed and method, a search is followed by a fine-tuning of its subnets on Ray Tune, by the
same recipe for all: side by side (`parallel`), down the `ladder`, or both from the same search. The
searches of one seed have the same number of evaluations; uniform widths need none. The same command
continues a benchmark that was stopped, and runs nothing whose result lies in DIR/results, so the
tables of committed results can be printed anywhere.

- cacp: the default search of this package. Its two answers, the policy's and the best candidate,
  are both repaired layer by layer, and the better on the search split is kept;
- random: the best of as many random allocations, with the other settings of the default search;
- uniform cap: the same share of all channels, or of the inner ones, in the default order and
  repair;
- uniform l1: the same widths, but the channels of least L1 norm are cut;
- torch-pruning norm, torch-pruning taylor: cut by that package (bench/torch_pruning_arms.py), which
  repairs nothing and is trained side by side;
- chex, dmcp, scp, network_adjustment, group_fisher: widths are learned in the first half of the
  recipe's epochs, and the subnets are fine-tuned side by side in the other half, so that all arms
  pass as many epochs of images; a step of dmcp passes its images several times;
- base: the base network, trained on by the recipe: the gain of the further epochs alone.

The table compares the fine-tuned accuracy with the base network's on the test split, which is
measured once a subnet. Differences have two intervals of 95 %: t over seeds, and a bootstrap over
images, which says nothing of other seeds. The package's sample only tries the command out; figures
worth reading need all of CIFAR-10: --train, --train-rows, --search, --search-rows, --test.
"""

import argparse
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from experiment import make_data_parser, run_values
from report import bootstrap, print_environment, print_table
from scipy.stats import t
from torch_pruning_arms import IMPORTANCES, prune

import cacp_ray
from cacp_ray.config.finetune import FinetuneConfig
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import ModelConfig, RunConfig
from cacp_ray.io.environment import describe_environment
from cacp_ray.io.files import read_json, write_file, write_json
from cacp_ray.pruning.subnet import save_subnet
from cacp_ray.pruning.verify import count_macs
from cacp_ray.reporting.displays import FinetuneDisplay
from cacp_ray.searching.strategies import WIDTH_STRATEGIES
from cacp_ray.training.metrics import predict
from cacp_ray.workflows.network import load_model
from cacp_ray.workflows.splits import Splits

Results = dict[tuple[str, int], dict[str, Any]]  # by method and seed
BASE = "base"
TORCH_PRUNING = "torch-pruning"
CALIBRATION = 2560  # training images for Taylor terms
METHODS: dict[str, dict[str, Any]] = {
    "cacp": {"strategy": "cacp"},
    "random": {"strategy": "random"},
    "uniform cap": {"strategy": "uniform"},
    "uniform l1": {"strategy": "uniform", "pruning": {"criterion": "l1"}},
    **{name: {"strategy": name} for name in WIDTH_STRATEGIES},
    **{f"{TORCH_PRUNING} {by}": {} for by in IMPORTANCES},
    BASE: {},
}


def main() -> None:
    options = parse_options()
    results: Results = {}
    for seed in options.seeds:
        for arm in list_arms(options):
            file = options.out / "results" / f"{arm.replace(' ', '-')}-seed-{seed}.json"
            if not file.exists():
                run(arm, seed, file, options)
            results[arm, seed] = read_result(file)
    print_results(results, options)
    print_differences(results, options)
    print_environment(options.seeds[0])


def parse_options() -> argparse.Namespace:
    parser = make_data_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, old or new")
    parser.add_argument("--test", default="embedded:test", help="Parquet of test images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument(
        "--orders", nargs="+", choices=("parallel", "ladder"), default=["parallel", "ladder"]
    )
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--evaluations", type=int, default=300, help="evaluations of each search")
    parser.add_argument("--config", type=Path, default=Path("tune_configs/finetune_plain.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="as finetune.epochs=8")
    return parser.parse_args()


def list_arms(options: argparse.Namespace) -> list[str]:
    """Methods with an order of training each, and those that are trained one by one."""
    return [
        arm
        for method in options.methods
        for arm in (
            [method]
            if is_alone(method) or method in WIDTH_STRATEGIES
            else [f"{method} {o}" for o in options.orders]
        )
    ]


def is_alone(arm: str) -> bool:
    """Whether its networks come from no search of ours."""
    return arm == BASE or arm.startswith(TORCH_PRUNING)


def run(arm: str, seed: int, file: Path, options: argparse.Namespace) -> None:
    """Searches, fine-tunes and writes accuracies, seconds and which images were right."""
    folder = options.out / file.stem
    has_order = arm.endswith((" parallel", " ladder"))
    method, _, order = arm.rpartition(" ") if has_order else (arm, "", "parallel")
    settings = [*options.set, f"finetune.seed={seed}", f"finetune.order={order}"]
    recipe = load_config(FinetuneConfig, options.config, settings)
    model = ModelConfig(name=options.model, weights=options.weights)
    with FinetuneDisplay() as display:
        if is_alone(arm):
            rates = [1.0] if arm == BASE else options.rates
            rows = [
                train_on(folder / f"rate-{rate:.2f}", arm, rate, model, recipe, options, display)
                for rate in rates
            ]
        else:
            rows = search_and_finetune(method, seed, folder, recipe, options, display.update)
    test = Splits(recipe_data(options)).read("test")
    hits = {"base": find_hits(load_model(model, len(test.classes)), test)}
    for row in rows:
        trained = cacp_ray.load_subnet(folder / row.pop("path"), trust=True)
        hits[f"{row['rate']:g}"] = find_hits(trained, test)
    packed = {name: np.packbits(is_right) for name, is_right in hits.items()}
    write_file(file.with_suffix(".npz"), lambda path: save_arrays(path, packed))
    about = {
        "epochs": recipe.finetune.epochs,
        "evaluations": options.evaluations,
        "trained_frontier": [] if is_alone(arm) else read_frontier(folder),
    }
    environment = describe_environment(seed)
    write_json(file, {**about, "test_images": len(test), "rates": rows, "environment": environment})


def search_and_finetune(
    method: str, seed: int, folder: Path, recipe: FinetuneConfig, options: Any, on_epoch: Any
) -> list[dict[str, Any]]:
    """Fine-tunes a copy of a search, which is run first or continued; a row a rate."""
    searched = options.out / f"{method.replace(' ', '-')}-seed-{seed}"
    values = {
        "name": searched.name,
        **run_values(options),
        "rates": options.rates,
        "evaluations": options.evaluations,
        "seed": seed,
        **METHODS[method],
    }
    search = load_config(RunConfig, values)
    if method in WIDTH_STRATEGIES:
        epochs = recipe.finetune.epochs // 2
        values |= {"widths": {"epochs": epochs}, "finetune": asdict(recipe.finetune)}
        search = load_config(RunConfig, values)
        later = replace(recipe.finetune, epochs=recipe.finetune.epochs - epochs)
        recipe = recipe.model_copy(update={"finetune": later})
    if not (searched / "result.json").exists():
        cacp_ray.search(search, searched, resume=(searched / "config.yaml").exists())
    if not folder.exists():
        shutil.copytree(searched, folder.with_suffix(".part"), dirs_exist_ok=True)
        folder.with_suffix(".part").rename(folder)
    resume = (folder / "finetune").exists()
    result = cacp_ray.finetune(folder, config=recipe, resume=resume, on_epoch=on_epoch)
    seconds = sum(result["seconds"].values()) - result["seconds"]["finetune"]
    keys = ("rate", "path", "cost_kept", "macs")
    scores = ("top1", "finetuned_top1", "test_top1")
    rows = []
    for row in result["rates"]:
        metrics = read_json(folder / row["path"] / "metrics.json")
        rows.append(
            {key: row[key] for key in keys}
            | {name: row[name.replace("top1", "score")] for name in scores}
            | {
                "start_top1": metrics["search_score_before"],  # of a ladder: after its cut
                "search_seconds": round(seconds, 1),  # for all rates, since it was last started
                "finetune_seconds": round(metrics["seconds"], 1),
            }
        )
    return rows


def read_frontier(folder: Path) -> list[dict[str, Any]]:
    """Networks of other rates, cut from the trained ones without training."""
    return read_json(folder / "result.json").get("trained_frontier") or []


def train_on(
    folder: Path, arm: str, rate: float, model: ModelConfig, recipe: Any, options: Any, display: Any
) -> dict[str, Any]:
    """Trains the base network, or one that Torch-Pruning cut, by the recipe; the row of a rate."""
    data = recipe_data(options)
    if not (folder / "subnet.json").exists():
        split = Splits(data).read("search")
        network = load_model(model, len(split.classes))
        total = kept = count_macs(network, split.tensors()[0][:1])
        if arm != BASE:
            images, labels = Splits(data).read("train").take(CALIBRATION).tensors()
            network = prune(network, images, labels, rate, by=arm.rpartition(" ")[2])
            kept = count_macs(network, images[:1])
        description = {
            "model": model.name,
            "num_classes": len(split.classes),
            "classes": split.classes,
            "input_shape": list(split.tensors()[0].shape[1:]),
            "cost": "macs",
            "rate": rate,
            "cost_kept": kept / total,
            "macs": kept,
        }
        save_subnet(folder, network, description)
    settings = recipe.model_copy(update={"model": model, "data": data})
    resume = (folder / "finetune").exists()
    metrics = cacp_ray.finetune(folder, config=settings, resume=resume, on_epoch=display.update)
    description = read_json(folder / "subnet.json")
    return {
        "rate": rate,
        "path": folder.name,
        "cost_kept": description["cost_kept"],
        "macs": description.get("macs"),
        "top1": metrics["search_score_before"],
        "finetuned_top1": metrics["search_score"],
        "test_top1": metrics["test_score"],
        "search_seconds": 0.0,
        "finetune_seconds": round(metrics["seconds"], 1),
    }


def recipe_data(options: argparse.Namespace) -> Any:
    """The three splits that the options name."""
    return load_config(RunConfig, run_values(options)).data


def find_hits(model: torch.nn.Module, split: Any) -> np.ndarray:
    """(N,) whether each image is right, in float32 like `test_top1`."""
    hits = []
    for part in split.parts(500):
        images, labels = part.tensors()
        hits.append(predict(model, images, 500, torch.float32).argmax(1) == labels)
    return torch.cat(hits).numpy()


def save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes to an open file: NumPy would add a suffix to a path."""
    with path.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def read_result(file: Path) -> dict[str, Any]:
    """What `run` wrote, with `hits` (N,) by rate and for `base`."""
    row = read_json(file)
    with np.load(file.with_suffix(".npz")) as packed:
        row["hits"] = {
            name: np.unpackbits(packed[name], count=row["test_images"]).astype(float)
            for name in packed.files
        }
    return row


def print_results(results: Results, options: Any) -> None:
    """Means and standard deviation over the seeds, one row for a rate and method."""
    first = next(iter(results.values()))
    whole = 100 * first["hits"]["base"].mean()
    rows = []
    for rate in [*sorted(options.rates), 1.0]:
        for arm in list_arms(options):
            mine = [
                row
                for seed in options.seeds
                for row in results[arm, seed]["rates"]
                if row["rate"] == rate
            ]
            if mine:
                rows.append([f"{rate:.2f}", arm, *describe(mine, whole)])
    images = first["test_images"]
    title = (
        f"{options.model}, base {whole:.2f} % on {images:,} test images; {first['epochs']} epochs, "
        f"{len(options.seeds)} seed(s), {first['evaluations']} evaluations a search"
    )
    header = [
        "kept", "method", "% MACs", "M MACs", "before, search", "search", "test", "change",
        "search, min", "fine-tuning, min",
    ]  # fmt: skip
    print_table(title, header, rows)
    error = 100 * (whole / 100 * (1 - whole / 100) / images) ** 0.5
    print(f"\nTop-1 in %; standard error of one test accuracy near the base: {error:.2f} points.")


def describe(mine: list[dict[str, Any]], whole: float) -> list[str]:
    """Cells of one rate and method; `mine` has a row a seed, `whole` is the base's top-1 in %."""

    def mean(key: str) -> float:
        return float(np.mean([row[key] for row in mine]))

    test = [100 * row["test_top1"] for row in mine]
    spread = f" ± {np.std(test, ddof=1):.2f}" if len(test) > 1 else ""
    return [
        f"{100 * mean('cost_kept'):.2f}",
        "" if mine[0]["macs"] is None else f"{mean('macs') / 1e6:.2f}",
        f"{100 * mean('top1'):.2f}",
        f"{100 * mean('finetuned_top1'):.2f}",
        f"{np.mean(test):.2f}{spread}",
        f"{np.mean(test) - whole:+.2f}",
        f"{mean('search_seconds') / 60:.1f}",
        f"{mean('finetune_seconds') / 60:.1f}",
    ]


def print_differences(results: Results, options: Any) -> None:
    """First arm less each other one, and each ladder less its parallel one, at every rate."""
    arms = [arm for arm in list_arms(options) if arm != BASE]
    pairs = [(arms[0], arm) for arm in arms[1:]]
    pairs += [
        (f"{method} ladder", f"{method} parallel")
        for method in options.methods
        if {f"{method} ladder", f"{method} parallel"} <= set(arms)
    ]
    rows = []
    for first, second in dict.fromkeys(pairs):
        for rate in sorted(options.rates):
            key = f"{rate:g}"
            gains = 100 * np.array(
                [
                    results[first, seed]["hits"][key] - results[second, seed]["hits"][key]
                    for seed in options.seeds
                ]
            )
            low, high = bootstrap(gains.mean(0))
            by_seed = gains.mean(1)
            half = np.inf
            if len(by_seed) > 1:
                spread = np.std(by_seed, ddof=1) / len(by_seed) ** 0.5
                half = t.ppf(0.975, len(by_seed) - 1) * spread
            rows.append(
                [
                    first,
                    second,
                    f"{rate:.2f}",
                    f"{gains.mean():+.2f} ± {half:.2f}",
                    f"[{low:+.2f}, {high:+.2f}]",
                    " ".join(f"{gain:+.2f}" for gain in by_seed),
                ]
            )
    if rows:
        header = ["arm", "less", "kept", "t over seeds", "over images", "by seed"]
        print_table("Differences on the test split in points", header, rows)


if __name__ == "__main__":
    main()
