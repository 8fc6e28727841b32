"""Tables of `bench/agents.py`: winners, the policy alone, and differences with their intervals.

python bench/agents_table.py OUT --evaluations 300
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from agents import METHODS, OPTIONS, OWN, RATES, UNSEEN, folder_name
from report import bootstrap, print_table
from scipy.stats import t

Runs = dict[int, dict[str, Any]]  # by seed
Results = dict[str, Runs]  # by method
ALONE = "cacp, a search a rate"
# Agents of earlier commits, whose results are kept: the agent had an actor, and its control had
# none. The control is what `cacp` is now, on RLlib.
FORMER = ("cacp, with an actor", "cacp, no actor")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--evaluations", type=int, default=300)
    parser.add_argument("--reference", default="cacp")
    options = parser.parse_args()
    names = (*METHODS, *FORMER)
    results = {name: read(options.out, name, options.evaluations) for name in names}
    own = results.pop(OWN)
    results[ALONE] = join([results.pop(f"cacp, {rate} alone") for rate in RATES])
    results = {name: runs for name, runs in results.items() if runs}
    print_winners(results, options)
    print_policies(results, own)
    if options.reference in results:
        print_differences(results, options.reference)
    print_effort(results)
    print_environments({**results, OWN: own})


def read(out: Path, method: str, evaluations: int) -> Runs:
    """Results of a method by seed, with `hits` of each split (rates, images).

    Older results do not name their commit and machine; environment.json in `out` does for them.
    """
    common = out / "environment.json"
    fallback = json.loads(common.read_text()) if common.exists() else {}
    runs: Runs = {}
    for seed in range(100):
        folder = out / folder_name(method, seed, evaluations)
        file = folder / f"after-{evaluations}.json"
        if not file.exists():
            continue
        row = {"environment": fallback, **json.loads(file.read_text())}
        with np.load(file.with_suffix(".npz")) as packed:
            row["hits"] = {
                split: np.unpackbits(packed[split], axis=1, count=count)
                for split, count in row["images"].items()
            }
        runs[seed] = row
    return runs


def join(alone: list[Runs]) -> Runs:
    """The searches of one seed for one rate each, as one row."""
    runs: Runs = {}
    for seed in sorted(set.intersection(*(set(rates) for rates in alone))):
        parts = [rates[seed] for rates in alone]
        runs[seed] = {
            "winners": [part["winners"][0] for part in parts],
            "hits": {
                split: np.concatenate([part["hits"][split] for part in parts])
                for split in parts[0]["hits"]
            },
            "environment": parts[0]["environment"],
            "evaluations": sum(part["evaluations"] for part in parts),
            "images_scored": float(np.mean([part["images_scored"] for part in parts])),
            "seconds": float(np.mean([part["seconds"] for part in parts])),
        }
    return runs


def print_winners(results: Results, options: Any) -> None:
    """Mean and, over seeds, standard deviation of the winners' accuracies."""
    rows = []
    for method, runs in results.items():
        cells = [method, str(len(runs))]
        for split in ("search", "test"):
            top1 = np.array([[w[f"{split}_top1"] for w in run["winners"]] for run in runs.values()])
            cells += [_cell(column) for column in top1.T] + [f"**{_cell(top1.mean(1))}**"]
        rows.append(cells)
    columns = [f"{split} {rate}" for split in ("search", "test") for rate in (*RATES, "mean")]
    print_table(
        f"Winners after {options.evaluations} evaluations, top-1 % (standard deviation over seeds)",
        ["method", "seeds", *columns],
        rows,
    )


def print_policies(results: Results, own: Runs) -> None:
    """Accuracy of the policies' own answers, and of a search at the unseen rates."""
    rates = [str(rate) for rate in (*RATES, *UNSEEN)]
    rows = []
    for method, runs in results.items():
        for name, title in (("policy", method), ("prior", f"the prior of {method}")):
            told = [run[name] for run in runs.values() if run.get(name)]
            if len(told) == len(runs):
                top1 = np.array([[answers[rate] for rate in rates] for answers in told])
                rows.append([title, *(_cell(column) for column in top1.T)])
    if own:
        top1 = np.array([[w["search_top1"] for w in run["winners"]] for run in own.values()])
        rows.append([OWN, *[""] * len(RATES), *(_cell(column) for column in top1.T)])
    header = ["method", *rates[: len(RATES)], *(f"{rate} (unseen)" for rate in rates[len(RATES) :])]
    print_table("The policy alone, top-1 % on the search split", header, rows)


def print_differences(results: Results, reference: str) -> None:
    """Mean over rates of the reference less each method, by a paired bootstrap over the images."""
    rows = []
    for method, runs in results.items():
        seeds = sorted(runs.keys() & results[reference].keys())
        if method == reference or not seeds:
            continue
        cells = [method, str(len(seeds))]
        for split in ("search", "test"):
            gains = np.array(
                [
                    results[reference][seed]["hits"][split].astype(float).mean(0)
                    - runs[seed]["hits"][split].astype(float).mean(0)
                    for seed in seeds
                ]
            )  # (seeds, images), mean over rates
            low, high = bootstrap(gains.mean(0))
            by_seed = 100 * gains.mean(1)
            cells.append(f"{by_seed.mean():+.2f} ± {half_width(by_seed):.2f}")
            cells.append(f"[{100 * low:+.2f}, {100 * high:+.2f}]")
            cells.append(" ".join(f"{gain:+.2f}" for gain in by_seed))
        rows.append(cells)
    print_table(
        f"{reference} less the method, mean over rates in points, intervals of 95 %",
        [
            "method",
            "seeds",
            *(
                f"{split}, {what}"
                for split in ("search", "test")
                for what in ("t over seeds", "over images", "by seed")
            ),
        ],
        rows,
    )


def half_width(by_seed: np.ndarray) -> float:
    """Half of the 95 % t interval of the mean over seeds; infinite for one."""
    if len(by_seed) < 2:
        return float("inf")
    return float(t.ppf(0.975, len(by_seed) - 1) * np.std(by_seed, ddof=1) / len(by_seed) ** 0.5)


def print_effort(results: Results) -> None:
    """What an evaluation took: more for probes of nearly whole networks, less when racing."""
    rows = [
        [method, *(f"{np.mean([run[key] for run in runs.values()]):.{digits}f}"
                   for key, digits in (("evaluations", 0), ("images_scored", 0), ("seconds", 2)))]
        for method, runs in results.items()
        if all("seconds" in run for run in runs.values())
    ]  # fmt: skip
    print_table("Effort", ["method", "evaluations", "images each", "seconds each"], rows)


def print_environments(results: Results) -> None:
    """Commits, machines and options of the searches, one line for all that share them."""
    searches: dict[str, dict[str, list[int]]] = {}
    for method, runs in results.items():
        for seed, run in runs.items():
            seeds = searches.setdefault(describe(run["environment"]), {})
            seeds.setdefault(method, []).append(seed)
    for text, methods in searches.items():
        named = "; ".join(f"{name} {' '.join(map(str, seeds))}" for name, seeds in methods.items())
        print(f"\n{text}. Methods and seeds: {named}.")


def describe(environment: dict[str, Any]) -> str:
    """Commit, machine and options of a search."""
    if not environment:
        return "Not known what these were run with"
    given = environment.get("options", {})
    options = [f"--{name.replace('_', '-')} {_text(given[name])}" for name in OPTIONS
               if given.get(name) is not None]  # fmt: skip
    return (
        f"Commit {environment['commit']}, {environment['processor']} with {environment['cpus']} "
        f"CPUs, one thread a search, {' '.join(options)}"
    )


def _text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(values: np.ndarray) -> str:
    spread = f" ({100 * values.std(ddof=1):.1f})" if len(values) > 1 else ""
    return f"{100 * values.mean():.1f}{spread}"


if __name__ == "__main__":
    main()
