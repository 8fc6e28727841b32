"""What tuning the agent gains, and what sharing saves: python bench/tuning.py --out DIR.

1. `tune-agent` by --config on the given network and images: all trials on one pool and cache.
2. Some of its trials again, each as a search of its own with all evaluators of the machine and no
   cache, to as many evaluations as the trial had: the cost of trials that share nothing.
3. Searches with the best settings and with the defaults, by seeds that the tuning never saw.

The same command continues a run that was stopped. Tuning and searches choose on the search split;
the test split is measured once for each winner. The package's sample only tries the command out;
figures worth reading need all of CIFAR-10: --train, --train-rows, --search, --search-rows, --test.
"""

import argparse
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from experiment import make_data_parser, run_values
from report import append_row, print_environment, print_table, read_rows

import cacp_ray
from cacp_ray.config.agent_tuning import AgentTuningConfig, with_settings
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.io.files import read_json, write_json
from cacp_ray.pruning.subnet import load_subnet
from cacp_ray.reporting.displays import TuningDisplay
from cacp_ray.training.metrics import measure_split
from cacp_ray.workflows.splits import Splits


def main() -> None:
    options = parse_options()
    config = read_tuning(options)
    tuned = tune(config, options.out / "tuning")
    alone = options.out / "alone.jsonl"
    for trial in pick(tuned["trials"], options.alone):
        search_alone(config, trial, alone, options.out)
    results = {
        (name, seed): search_again(values, seed, options.out / f"{name}-seed-{seed}", options.out)
        for seed in options.seeds
        for name, values in list_settings(config, options.out / "tuning").items()
    }
    if (options.out / "tuning" / "stopped").exists():
        print("\nThe tuning was stopped once, so that its time says nothing: sharing not measured.")
    else:
        print_savings(config, tuned, read_rows(alone))
    print_searches(results, config.search)
    print_settings(tuned)
    print_environment(config.seed)


def parse_options() -> argparse.Namespace:
    parser = make_data_parser(__doc__ or "")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs, old or new")
    parser.add_argument("--test", default="embedded:test", help="Parquet of test images")
    parser.add_argument("--config", type=Path, default=Path("tune_configs/agent_asha.yaml"))
    parser.add_argument("--set", nargs="*", default=[], help="as trials=8")
    parser.add_argument("--alone", type=int, default=6, help="trials that are repeated alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[10, 11, 12], help="for part 3")
    return parser.parse_args()


def read_tuning(options: argparse.Namespace) -> AgentTuningConfig:
    """The configuration of the tuning on the network and images of the options."""
    values = yaml.safe_load(options.config.read_text())
    values["search"] |= run_values(options)
    return load_config(AgentTuningConfig, values, options.set)


def tune(config: AgentTuningConfig, folder: Path) -> dict[str, Any]:
    """Runs all trials, or those that are left."""
    with TuningDisplay(config.trials, config.objective) as display:
        resume = (folder / "config.yaml").exists()
        if resume and not (folder / "result.json").exists():
            (folder / "stopped").touch()
        return cacp_ray.tune_agent(config, folder, resume=resume, on_progress=display.update)


def pick(trials: list[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """`number` trials, evenly spaced from the best to the poorest."""
    places = np.unique(np.linspace(0, len(trials) - 1, min(number, len(trials))).round())
    return [trials[int(place)] for place in places]


def search_alone(config: AgentTuningConfig, trial: dict[str, Any], log: Path, out: Path) -> None:
    """Repeats a trial's searches and logs the seconds of start and search of each."""
    done = {(row["trial"], row["seed"]) for row in read_rows(log)}
    for seed in config.seeds:
        if (trial["name"], seed) in done:
            continue
        values = {"evaluations": trial["evaluations"], "seed": seed, "mode": "rounds"}
        search = with_settings(config.search, trial["settings"], **values)
        folder = out / f"alone-{trial['name']}-{seed}"
        run = cacp_ray.search(search, folder, resume=(folder / "config.yaml").exists())
        seconds = run.result["seconds"]
        row = {"trial": trial["name"], "seed": seed, "evaluations": trial["evaluations"]}
        append_row(log, row | {name: seconds[name] for name in ("start", "search")})


def list_settings(config: AgentTuningConfig, folder: Path) -> dict[str, RunConfig]:
    """The configurations of part 3."""
    return {"default": config.search, "tuned": load_config(RunConfig, folder / "best.yaml")}


def search_again(config: RunConfig, seed: int, folder: Path, out: Path) -> dict[str, Any]:
    """Searches by a seed that the tuning never saw, and measures its subnets on the test split.

    The searches share a cache of measurements.
    """
    search = with_settings(config, {}, seed=seed)
    resume = (folder / "config.yaml").exists()
    run = cacp_ray.search(search, folder, resume=resume, cache=out / "cache")
    file = folder / "test.json"
    if not file.exists():
        test = Splits(search.data).open("test")
        top1 = [measure_split(load_subnet(path), test).top1 for path in run.subnets.values()]
        write_json(file, top1)
    return {"rates": run.result["rates"], "test": read_json(file)}


def print_savings(
    config: AgentTuningConfig, tuned: dict[str, Any], alone: list[dict[str, Any]]
) -> None:
    """Prints where answers came from, and the wall time of trials that share or do not."""
    answers = tuned["answers"]
    asked = sum(answers.values())
    evaluations = len(config.seeds) * sum(trial["evaluations"] for trial in tuned["trials"])
    shared = sum(tuned["seconds"].values()) / evaluations
    number = sum(row["evaluations"] for row in alone)
    search = sum(row["search"] for row in alone) / number
    start = sum(row["start"] for row in alone) / len(config.seeds) / number  # once a trial
    rows = [
        ["trials; evaluations of all searches", f"{len(tuned['trials'])}; {evaluations:,}"],
        ["candidates asked for", f"{asked:,}"],
        *([f"answered: {name}", f"{100 * n / asked:.1f} %"] for name, n in answers.items()),
        ["seconds an evaluation, shared", f"{shared:.3f}"],
        [f"seconds an evaluation, alone ({len(alone)} searches)", f"{search:.3f}"],
        ["alone / shared", f"{search / shared:.2f}"],
        ["alone with the start of every trial / shared", f"{(search + start) / shared:.2f}"],
    ]
    print_table("One pool and cache for all trials", ["", ""], rows)


def print_searches(results: dict[tuple[str, int], dict[str, Any]], search: RunConfig) -> None:
    """Accuracy of the winners by settings and seed."""
    rows = []
    for (name, seed), result in sorted(results.items()):
        scored = [100 * row["search_score"] for row in result["rates"]]
        repaired = [100 * row["score"] for row in result["rates"]]
        means = [statistics.mean(scored), statistics.mean(repaired)]
        figures = [*scored, *means, 100 * statistics.mean(result["test"])]
        rows.append([name, f"{seed}", *(f"{value:.2f}" for value in figures)])
    title = f"Searches of {search.evaluations} evaluations, before fine-tuning, top-1 in %"
    rates = [f"{rate:g}" for rate in search.rates]
    header = ["settings", "seed", *rates, "mean", "repaired layer by layer", "the same, test"]
    print_table(title, header, rows)


def print_settings(tuned: dict[str, Any]) -> None:
    """The default settings and the best trial's."""
    best = tuned["trials"][0]
    rows = [[key, f"{value}", f"{best['settings'][key]}"] for key, value in tuned["start"].items()]
    print_table("Settings", ["setting", "default", f"best ({best['name']})"], rows)


if __name__ == "__main__":
    main()
