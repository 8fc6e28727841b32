"""Searches of networks and scores other than image classification: before and after training.

OMP_NUM_THREADS=1 python bench/own_tasks.py --train TRAIN.parquet --test TEST.parquet \
    --photographs PHOTOGRAPHS.parquet --heldout HELDOUT.parquet --out OUT \
    [--tasks super-resolution segmentation digits siamese] [--seeds 0 1 2] [--evaluations 120]

super-resolution: three times the sides of gray photographs, a pixel-shuffle network, PSNR in dB.
segmentation: handwritten digits on photographs, torchvision's LRASPP (a dictionary), mean IoU.
digits: scikit-learn's handwritten digits as sequences of 64 values, a 1-d network, accuracy.
siamese: whether two crops come from one CIFAR-10 image, a network of two inputs, accuracy.

TRAIN and TEST are CIFAR-10, PHOTOGRAPHS at least 1,000 photographs and HELDOUT 500 others, all as
Parquet files with encoded images. This script trains every network. A seed is one search by each
strategy, at equal evaluations (uniform has nothing to search), and one training of every subnet by
the task's own loop. The same loop trains the whole network on. Validation data judges the searches;
the table is of test data, which chose nothing. Cells are means over seeds and half the width of a
95 % t interval over seeds. The same command goes on after a kill, and prints the tables of finished
results without any data.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from own_problems import PROBLEMS, Problem
from report import print_environment, print_table
from scipy.stats import t
from torch import nn

import cacp_ray
from cacp_ray.io.environment import describe_environment

RATES = (0.3, 0.5, 0.7)
STRATEGIES = ("uniform", "random", "cacp")
QUIET = {"frontier": False, "learning": False, "latency": False}


def train_base(problem: Problem, folder: Path) -> nn.Module:
    """The whole network, trained once."""
    file = folder / "base.pt"
    torch.manual_seed(0)
    net = problem.make()
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        problem.train(net, problem.epochs, seed=0)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    return net.eval()


def run_one(
    problem: Problem, net: nn.Module, folder: Path, strategy: str, seed: int, evaluations: int
) -> dict[str, Any]:
    """One search, and the training of what it found; test scores by rate."""
    count = min(256, len(problem.data.train[0]))
    run = cacp_ray.search(
        {"strategy": strategy, "seed": seed, "report": QUIET},
        folder,
        model=net,
        example_inputs=tuple(column[:1] for column in problem.data.train[:-1]),
        calibration=lambda: problem.batches(count),
        score=lambda small: problem.measure(small, "search"),
        metric=problem.metric,
        rates=RATES,
        evaluations=9 if strategy == "uniform" else evaluations,
        resume=(folder / "config.yaml").exists(),
    )
    epochs = problem.epochs // 3
    if any(row.get("finetuned_score") is None for row in run.result["rates"]):
        resume = (folder / "finetune").exists()
        run.finetune(
            lambda small, context: problem.train(small, epochs, seed, context), resume=resume
        )
    rows = []
    for rate, path in run.subnets.items():
        before = cacp_ray.load_subnet(path, model=net, finetuned=False)
        after = cacp_ray.load_subnet(path, model=net)
        scores = {
            "before": problem.measure(before, "test"),
            "after": problem.measure(after, "test"),
        }
        rows.append({"rate": rate, "kept": run.result["rates"][len(rows)]["cost_kept"], **scores})
    return {"strategy": strategy, "seed": seed, "evaluations": evaluations, "rows": rows}


def cell(values: list[float], scale: float) -> str:
    """Mean, and half of a 95 % t interval over seeds."""
    mean = scale * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, len(values) - 1) * scale * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="CIFAR-10, Parquet")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10, Parquet")
    parser.add_argument("--photographs", type=Path, required=True, help="1,000 or more, Parquet")
    parser.add_argument("--heldout", type=Path, required=True, help="500 others, Parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=120)
    options = parser.parse_args()
    for name in options.tasks:
        files = {
            (s, n): options.out / name / f"{s}-{n}.json" for n in options.seeds for s in STRATEGIES
        }
        whole = options.out / name / "base.json"
        if not all(file.exists() for file in (*files.values(), whole)):
            run_all(PROBLEMS[name](options), options.out / name, files, whole, options)
        results = [json.loads(file.read_text()) for file in files.values()]
        print_results(name, results, json.loads(whole.read_text()), len(options.seeds))
    print_environment(options.seeds[0])


def run_all(
    problem: Problem, folder: Path, files: dict[tuple[str, int], Path], whole: Path, options: Any
) -> None:
    """Runs what has no file yet; writes a file for each search and one for the whole network."""
    net = train_base(problem, folder)
    for (strategy, seed), file in files.items():
        if not file.exists():
            where = folder / "runs" / f"{strategy}-{seed}"
            found = run_one(problem, net, where, strategy, seed, options.evaluations)
            file.write_text(json.dumps(found, indent=1))
    base = {
        "metric": problem.metric,
        "test": problem.measure(net, "test"),
        "trained_on": [train_on(problem, net, seed) for seed in options.seeds],
        "environment": describe_environment(0),
    }
    whole.write_text(json.dumps(base, indent=1))


def print_results(
    name: str, results: list[dict[str, Any]], base: dict[str, Any], seeds: int
) -> None:
    """One table: strategies before and after training, by rate."""
    is_share = "dB" not in base["metric"]
    scale = 100.0 if is_share else 1.0
    table = [
        [f"{strategy}, {when}", *(
            cell([row[when] for r in results if r["strategy"] == strategy
                  for row in r["rows"] if row["rate"] == rate], scale)
            for rate in RATES
        )]
        for when in ("before", "after")
        for strategy in STRATEGIES
    ]  # fmt: skip
    title = (
        f"{name}: {base['metric']}{' %' if is_share else ''} on test data, whole network "
        f"{scale * base['test']:.2f}, trained on {cell(base['trained_on'], scale)}; {seeds} seeds"
    )
    print_table(title, ["strategy", *map(str, RATES)], table)


def train_on(problem: Problem, net: nn.Module, seed: int) -> float:
    """Test score of the whole network, trained on like a subnet; the best epoch by validation."""
    whole = problem.make()
    whole.load_state_dict(net.state_dict())

    class Keep:
        state, epoch = None, 0
        best = (problem.measure(net, "search"), problem.measure(net, "test"))

        def report(self, trained: nn.Module, state: Any) -> None:
            found = problem.measure(trained, "search"), problem.measure(trained, "test")
            self.best = max(self.best, found, key=lambda pair: pair[0])

    keep = Keep()
    problem.train(whole, problem.epochs // 3, seed, keep)
    return keep.best[1]


if __name__ == "__main__":
    main()
