"""What the policy answers without evaluations, beside simpler rules: python bench/answers.py OUT.

OUT holds searches by `bench/agents.py --methods cacp`, begun with the same options; their last
checkpoints answer the searched rates and others:

- prior: the allocation that the search began from;
- actor: the actor's own answer;
- mean: of the best allocations of the nearest searched rates, without any learned judgement;
- policy: what `cacp-ray subnet RUN --rate R` answers: the mean of the drafts around the actor and
  good allocations that the critics favour.

Each answer is repaired and scored on the whole search split. Nothing is chosen by these figures.
"""

import argparse
import logging
from pathlib import Path

import numpy as np
import torch
from agents import OPTIONS, SPLITS, Job, make_config, measure
from report import parse_rows, print_environment, print_table

from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache, key_of_scores
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.loading import load_base, prepare_base
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.strategies import make_run_strategy
from cacp_ray.training.metrics import fast_dtype

RULES = ("prior", "actor", "mean", "policy")


def main() -> None:
    options = parse_options()
    logging.getLogger().setLevel(logging.ERROR)
    torch.set_num_threads(1)
    found = {rule: np.zeros((len(options.seeds), len(options.rates))) for rule in RULES}
    for place, seed in enumerate(options.seeds):
        for rule, top1 in answer(seed, options).items():
            found[rule][place] = top1
    rates = [f"{rate:g}" for rate in options.rates]
    rows = [
        [rule, *(f"{value:.1f}" for value in 100 * top1.mean(0)), f"{100 * top1.mean():.2f}"]
        for rule, top1 in found.items()
    ]
    title = f"Answers after {options.evaluations} evaluations, top-1 in %, {place + 1} seed(s)"
    print_table(title, ["rule", *rates, "mean"], rows)
    gains = 100 * (found["policy"] - found["mean"]).mean(1)
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
    parser.add_argument("--evaluations", type=int, default=800, help="of each search")
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
    """(rates,) accuracies of every rule, of one search."""
    folder = options.out / f"cacp-seed-{seed}"
    config = make_config(Job("cacp", seed, (options.evaluations,), folder), options)
    base = load_base(config)
    prepared = prepare_base(base, config)
    score = make_scorer(prepared, base.search, recovery="compensate", dtype="auto", threads=1)
    key = key_of_scores(prepared, base.search, recovery="compensate", dtype=str(fast_dtype()))
    cache = MeasurementCache(options.out / "cache", key)
    evaluator = CachedEvaluator(LocalEvaluator(score), cache, len(base.search))
    strategy, agent = make_run_strategy(config, base)
    checkpoint = RunDirectory(folder).find_checkpoint()
    if checkpoint is None:
        raise SystemExit(f"{folder} has no checkpoint: run bench/agents.py --methods cacp first")
    strategy.restore(checkpoint[0] / "strategy")
    rates = np.array(options.rates)
    space = agent.mdp.space
    answers = {
        "prior": agent.mdp.prior(rates),
        "actor": space.decode(rates, agent._act(rates)),
        "mean": space.decode(rates, agent._behaviour.between(rates)),
        "policy": agent.policy(rates),
    }
    agent.stop()
    found = {}
    for rule, counts in answers.items():
        top1 = measure(evaluator, options.rates, counts)
        found[rule] = np.array([top1[rate][0] for rate in options.rates])
    return found


if __name__ == "__main__":
    main()
