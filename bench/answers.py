"""The policy's answers without evaluations, next to simpler rules: python bench/answers.py OUT.

OUT holds searches by `bench/agents.py --methods cacp` with the same options. Their last checkpoints
answer the searched rates and others by three rules:

- prior: the allocation that the search began from;
- mean: the mean of the best allocations of the nearest searched rates, without learned judgement;
- policy: the answer of `cacp-ray subnet RUN --rate R`, the mean of the drafts around good
  allocations that the critics favour.

Each answer is repaired and scored on the whole search split. These figures choose nothing.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from agents import OPTIONS, SPLITS, Job, make_config, measure
from report import parse_rows, print_environment, print_table

from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache, key_of_scores
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.training.metrics import fast_dtype
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import find_policy, make_run_strategy

RULES = ("prior", "actor", "mean", "policy")


def main() -> None:
    options = parse_options()
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    accuracies = {rule: np.zeros((len(options.seeds), len(options.rates))) for rule in RULES}
    for place, seed in enumerate(options.seeds):
        for rule, top1 in answer(seed, options).items():
            accuracies[rule][place] = top1
    rates = [f"{rate:g}" for rate in options.rates]
    rows = [
        [rule, *(f"{value:.1f}" for value in 100 * top1.mean(0)), f"{100 * top1.mean():.2f}"]
        for rule, top1 in accuracies.items()
    ]
    title = f"Answers after {options.evaluations} evaluations, top-1 in %, {place + 1} seed(s)"
    print_table(title, ["rule", *rates, "mean"], rows)
    gains = 100 * (accuracies["policy"] - accuracies["mean"]).mean(1)
    print(f"\npolicy less mean, by seed: {' '.join(f'{gain:+.2f}' for gain in gains)}")
    print_environment(options.seeds[0])


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", default="embedded:resnet20_cifar10")
    for name in SPLITS:
        parser.add_argument(f"--{name}", default=f"embedded:{name}", help="Parquet file")
        parser.add_argument(f"--{name}-rows", type=parse_rows, help="START:STOP")
    parser.add_argument("--evaluations", type=int, default=800, help="evaluations of each search")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[0.3, 0.5, 0.7, 0.35, 0.4, 0.45, 0.55, 0.6, 0.65],
    )
    parser.set_defaults(groups="all")
    options = parser.parse_args()
    assert all(hasattr(options, name) for name in OPTIONS)
    return options


def answer(seed: int, options: argparse.Namespace) -> dict[str, np.ndarray]:
    """(rates,) accuracies of every rule for one search."""
    folder = options.out / f"cacp-seed-{seed}"
    config = make_config(Job("cacp", seed, (options.evaluations,), folder), options)
    setup = Setup.create(config).prepare()
    score = Scorer(setup.prepared, setup.search, recovery="compensate", dtype="auto", threads=1)
    key = key_of_scores(
        setup.prepared, setup.search, recovery="compensate", dtype=str(fast_dtype())
    )
    cache = MeasurementCache(options.out / "cache", key)
    evaluator = CachedEvaluator(LocalEvaluator(score), cache, len(setup.search))
    strategy = make_run_strategy(setup)
    checkpoint = RunDirectory(folder).find_checkpoint()
    if checkpoint is None:
        raise SystemExit(f"{folder} has no checkpoint: run bench/agents.py --methods cacp first")
    strategy.restore(checkpoint[0] / "strategy")
    agent: Any = find_policy(strategy)
    rates = np.array(options.rates)
    space = agent.space
    answers = {
        "prior": space.prior(rates),
        "mean": space.decode(rates, agent._behaviour.between(rates)),
        "policy": agent.policy(rates),
    }
    agent.stop()
    accuracies = {}
    for rule, counts in answers.items():
        measured = measure(evaluator, options.rates, counts)
        accuracies[rule] = np.array([measured[rate][0] for rate in options.rates])
    return accuracies


if __name__ == "__main__":
    main()
