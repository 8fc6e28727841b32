"""Fine-tuned accuracy of searched, random and uniform subnets: python bench/finetune.py --out DIR.

Every method searches once, at the same evaluations; its subnets are fine-tuned by one recipe, once
a seed, all rates side by side on Ray Tune. The table says what the fine-tuning left of the base
network's accuracy on the test split, which is measured once a subnet. With the same command, a run
that was stopped goes on: finished searches and fine-tunings are not repeated.

- cacp: the default search of this package;
- random: the best of as many random allocations, all else as in the default search;
- uniform l1: the same share of all channels, or of the inner ones, those of least L1 norm cut.

The sample that the package embeds shows that it works; figures worth reading need all of CIFAR-10:
--train, --train-rows, --search, --search-rows, --test.
"""

import argparse
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from experiment import make_parser, run_values
from report import append_row, print_environment, print_table, read_rows

import cacp_ray
from cacp_ray.config import RunConfig, load_config
from cacp_ray.files import read_json, write_json
from cacp_ray.finetuning import FinetuneConfig
from cacp_ray.reporting.progress import FinetuneDisplay

METHODS: dict[str, dict[str, Any]] = {
    "cacp": {"strategy": "cacp"},
    "random": {"strategy": "random"},
    "uniform l1": {"strategy": "uniform", "pruning": {"criterion": "l1"}},
}
COPIED = ("config.yaml", "environment.json", "model.json", "result.json", "subnets")


def main() -> None:
    options = parse_options()
    recipe = load_config(FinetuneConfig, options.config, options.set)
    times = options.out / "times.jsonl"
    results: dict[tuple[str, int], dict[str, Any]] = {}
    for method in options.methods:
        run = options.out / method.replace(" ", "-")
        search_once(method, run, options, times)
        for seed in options.seeds:
            place = run.with_name(f"{run.name}-seed-{seed}")
            results[method, seed] = finetune_once(run, place, recipe, seed, times)
    print_results(results, recipe, options)
    print_times(times)
    print_environment(options.seed)


def parse_options() -> argparse.Namespace:
    parser = make_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs; gone on with")
    parser.add_argument("--test", default="embedded:test", help="Parquet of test images")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5, 0.7])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1], help="of the fine-tuning")
    parser.add_argument("--evaluations", type=int, default=300, help="of each search")
    parser.add_argument("--config", type=Path, default=Path("tune_configs/finetune_plain.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="of the recipe: finetune.epochs=8")
    return parser.parse_args()


def search_once(method: str, run: Path, options: argparse.Namespace, times: Path) -> None:
    """Searches, or goes on with a search; one under other options is refused."""
    started = time.monotonic()
    values = {
        "name": run.name,
        **run_values(options),
        "rates": options.rates,
        "evaluations": options.evaluations,
        "seed": options.seed,
        **METHODS[method],
    }
    config = load_config(RunConfig, values)
    is_done = (run / "result.json").exists()
    cacp_ray.search(config, run, resume=(run / "config.yaml").exists())
    if is_done:
        return
    append_row(times, {"part": f"search {method}", "seconds": time.monotonic() - started})


def finetune_once(
    run: Path, place: Path, recipe: FinetuneConfig, seed: int, times: Path
) -> dict[str, Any]:
    """Fine-tunes a copy of the run by the recipe with another seed, or goes on with that."""
    if not (place / "copied").exists():
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name in COPIED:
            copy = shutil.copytree if (run / name).is_dir() else shutil.copy
            copy(run / name, place / name)
        (place / "copied").touch()
    values = recipe.model_dump(mode="json")
    values["finetune"]["seed"] = seed
    asked = place / "finetuning.json"
    if asked.exists() and read_json(asked) != values:
        raise SystemExit(f"{place} was fine-tuned by another recipe: delete it, or give that one")
    write_json(asked, values)
    saved = read_json(place / "result.json")
    if all(row["test_top1"] is not None for row in saved["rates"]):
        return saved
    settings = FinetuneConfig.model_validate(values)
    started = time.monotonic()
    resume = (place / "finetune").exists()
    with FinetuneDisplay() as display:
        result = cacp_ray.finetune(place, config=settings, resume=resume, on_epoch=display.update)
    append_row(times, {"part": f"fine-tune {place.name}", "seconds": time.monotonic() - started})
    return result


def print_results(
    results: dict[tuple[str, int], dict[str, Any]],
    recipe: FinetuneConfig,
    options: argparse.Namespace,
) -> None:
    """One row a rate and method: means over the seeds, and their standard deviation."""
    base = next(iter(results.values()))["base"]
    whole = 100 * base["test"]["top1"]
    rows = []
    for rate in sorted(options.rates):
        for method in options.methods:
            found = [
                next(row for row in results[method, seed]["rates"] if row["rate"] == rate)
                for seed in options.seeds
            ]
            test = [100 * row["test_top1"] for row in found]
            spread = f" ± {statistics.stdev(test):.2f}" if len(test) > 1 else ""
            rows.append(
                [
                    f"{rate:.2f}",
                    method,
                    f"{100 * found[0]['cost_kept']:.2f}",
                    f"{found[0]['macs'] / 1e6:.2f}",
                    f"{100 * found[0]['top1']:.2f}",
                    f"{100 * statistics.mean(row['finetuned_top1'] for row in found):.2f}",
                    f"{statistics.mean(test):.2f}{spread}",
                    f"{statistics.mean(test) - whole:+.2f}",
                ]
            )
    images = base["test"]["images"]
    title = (
        f"{options.model}, base {whole:.2f} % on {images:,} test images; {recipe.finetune.epochs} "
        f"epochs, {len(options.seeds)} seed(s), {options.evaluations} evaluations a search"
    )
    header = ["kept", "method", "% MACs", "M MACs", "before, search", "search", "test", "change"]
    print_table(title, header, rows)
    error = 100 * (whole / 100 * (1 - whole / 100) / images) ** 0.5
    print(f"\nTop-1 in %; standard error of one test accuracy near the base: {error:.2f} points.")


def print_times(times: Path) -> None:
    """Wall time of every part, of a stopped one after it went on."""
    rows = [[row["part"], f"{row['seconds'] / 60:.1f}"] for row in read_rows(times)]
    title = "Wall time; of a part that was stopped, since it last went on"
    print_table(title, ["part", "minutes"], rows)


if __name__ == "__main__":
    main()
