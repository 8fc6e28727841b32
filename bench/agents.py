"""Search strategies at equal evaluations: accuracy of what each finds, before any fine-tuning.

python bench/agents.py --out OUT --groups all --evaluations 300 800 --seeds 0 1 2 \
    --train TRAIN.parquet --train-rows 0:45000 --search TRAIN.parquet --search-rows 45000:50000 \
    --test TEST.parquet --methods cacp cacp-paper amc random uniform hill_climb

All methods share the network, its order (`cap`), the recovery (compensation), the groups and the
images; an evaluation is one distinct candidate on the whole search split. What a policy answers at
the searched rates counts among the evaluations. Winners are chosen on the search split and measured
once on the test split. Every run has a folder in --out: a killed benchmark goes on where it stood.
Its after-N.json says what was found, and with which options, commit and machine. Several numbers
of evaluations are one search read several times, but for strategies whose schedule depends on it;
the sensitivity map of a network of many groups does too, so there a call for each is needed. What
one search has measured is not measured again by another, and counts for both; racing searches share
nothing.
`python bench/agents_table.py OUT...` prints the tables.
"""

import argparse
import logging
import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from experiment import RATES
from report import parse_rows

from cacp_ray.config import RunConfig, load_config
from cacp_ray.data.images import ImageSet
from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache, key_of_scores
from cacp_ray.evaluation.measurement import Candidate, Evaluator, LocalEvaluator, Subnet
from cacp_ray.evaluation.preparation import Cutters, Prepared
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.files import describe_environment, write_json
from cacp_ray.loading import Base, load_base, prepare_base, read_split
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.searching.strategies import prior
from cacp_ray.strategies import make_run_strategy
from cacp_ray.training.metrics import fast_dtype, predict

UNSEEN = (0.4, 0.6)
ROUND_SIZE = 6
# What differs from the defaults. Where the schedule depends on the number of evaluations, each
# number is a search of its own; all others go on from the smaller one.
METHODS: dict[str, dict[str, Any]] = {
    "cacp": {},
    # No gradient step, so no screening either: elites and noise around the prior remain.
    "cacp, no learning": {"agent": {"updates_per_episode": 0}},
    "cacp, uniform prior": {},
    "cacp, no screening": {"agent": {"drafts": 1}},
    "cacp, no elites": {"agent": {"elite_share": 0.0}},
    "cacp, racing": {"evaluation": {"racing": True}},
    "cacp-paper": {"strategy": "cacp-paper"},
    "amc": {"strategy": "amc"},
    "amc, prior": {"strategy": "amc", "paper": {"prior": True}},
    "sequential, prior": {"strategy": "cacp-paper", "paper": {"prior": True}},
    "hill_climb": {"strategy": "hill_climb"},
    "cem": {"strategy": "cem"},
    "noise": {"strategy": "noise"},
    "evolution": {"strategy": "evolution"},
    "optuna": {"strategy": "optuna"},
    "pcp": {"strategy": "pcp"},
    "greedy": {"strategy": "greedy"},
    "cap": {"strategy": "cap"},
    "sensitivity": {"strategy": "sensitivity"},
    "global": {"strategy": "global"},
    "cpmc": {"strategy": "cpmc"},
    "adapruner": {"strategy": "adapruner"},
    "random": {"strategy": "random"},
    "uniform": {"strategy": "uniform"},
    "cacp, own search": {"rates": UNSEEN},
}
MAP_SHARE = prior.MAP_SHARE
OWN = "cacp, own search"  # at the rates that all others leave out, as many evaluations a rate
SCHEDULED = ("cacp-paper", "amc", "amc, prior", "sequential, prior", "pcp", "greedy", "sensitivity")
# What the result of a search depends on, beside its folder's name.
SPLITS = ("train", "search", "test")
OPTIONS = ("model", "weights", "groups", *SPLITS, *(f"{name}_rows" for name in SPLITS))
Winner = tuple[float, Subnet]  # top1
NONE: Winner = (-1.0, ((), ""))


@dataclass(frozen=True)
class Job:
    """One search: read at every milestone."""

    method: str
    seed: int
    milestones: tuple[int, ...]
    folder: Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--weights", default="embedded:resnet20_cifar10")
    for name in SPLITS:
        parser.add_argument(f"--{name}", default=f"embedded:{name}", help="Parquet file")
        parser.add_argument(f"--{name}-rows", type=parse_rows, help="START:STOP")
    parser.add_argument("--groups", choices=["all", "inner"], default="all")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--evaluations", nargs="+", type=int, default=[300])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="searches side by side, a thread each")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=spawn) as pool:
        running = {pool.submit(run, job, options): job for job in list_jobs(options)}
        for done in as_completed(running):
            done.result()
            job = running[done]
            print(f"done: {job.method}, seed {job.seed}, {job.milestones}", flush=True)


def list_jobs(options: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that a table of few seeds comes early."""
    jobs: list[Job] = []
    for seed in options.seeds:
        for method in options.methods:
            totals = sorted(options.evaluations)
            parts = [(n,) for n in totals] if method in SCHEDULED else [tuple(totals)]
            for part in parts:
                folder = options.out / folder_name(method, seed, part[-1])
                jobs.append(Job(method, seed, part, folder))
    return jobs


def folder_name(method: str, seed: int, evaluations: int) -> str:
    """Of one search; only where the schedule depends on it does the number matter."""
    name = method.replace(", ", "-").replace(" ", "-")
    return f"{name}-{evaluations}-seed-{seed}" if method in SCHEDULED else f"{name}-seed-{seed}"


def make_config(job: Job, options: argparse.Namespace) -> RunConfig:
    """The run's configuration, all groups prunable or the inner ones alone."""
    splits = {
        name: {"path": getattr(options, name), "rows": getattr(options, f"{name}_rows")}
        for name in SPLITS
    }
    values: dict[str, Any] = {
        "name": job.folder.name,
        "model": {"name": options.model, "weights": options.weights},
        "data": splits,
        "rates": RATES,
        "evaluations": to_ask(job.method, job.milestones[-1]),
        "mode": "rounds",
        "round_size": ROUND_SIZE,
        "seed": job.seed,
        **METHODS[job.method],
    }
    return load_config(RunConfig, values)


def to_ask(method: str, evaluations: int) -> int:
    """Evaluations of a method: as many a rate for all."""
    return evaluations * len(METHODS[method].get("rates", RATES)) // len(RATES)


def run(job: Job, options: argparse.Namespace) -> None:
    """One search to its end, with what it found by every milestone."""
    files = {n: job.folder / f"after-{n}.json" for n in job.milestones}
    if all(file.exists() for file in files.values()):
        return
    logging.getLogger().setLevel(logging.ERROR)
    # An ablation, no setting: the process may run several jobs.
    prior.MAP_SHARE = 0.0 if job.method.endswith("uniform prior") else MAP_SHARE
    torch.set_num_threads(1)
    config = make_config(job, options)
    base = load_base(config)
    if options.groups == "inner":
        streams = [g.producers[0] for g in base.plan.groups if g.is_residual]
        values = config.model_dump() | {"pruning": config.pruning.model_dump() | {"keep": streams}}
        config = load_config(RunConfig, values)
        base = load_base(config)
    prepared = prepare_base(base, config)
    score = make_scorer(prepared, base.search, recovery="compensate", dtype="auto", threads=1)
    evaluator: Evaluator = LocalEvaluator(score)
    if not config.evaluation.racing:  # which is to be seen with what it leaves out
        key = key_of_scores(prepared, base.search, recovery="compensate", dtype=str(fast_dtype()))
        cache = MeasurementCache(options.out / "cache", key)
        evaluator = CachedEvaluator(evaluator, cache, len(base.search))
    directory = RunDirectory(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    strategy, agent = make_run_strategy(config, base, lambda _: loop.tick(strategy))
    reserve = len(config.rates) if agent is not None else 0
    loop = SearchLoop(
        evaluator,
        base.plan.cost_model,
        directory,
        rates=config.rates,
        evaluations=config.evaluations - reserve,
        mode="rounds",
        round_size=ROUND_SIZE,
        races=config.evaluation.racing,
    )
    loop.restore(strategy)
    waiting = [n for n in job.milestones if not files[n].exists()]
    while waiting:
        number = to_ask(job.method, waiting[0]) - reserve
        while not loop.done and loop.progress.evaluations < number:
            if agent is not None and agent.is_attached:
                agent.train()
            else:
                loop.tick(strategy)
        answers, priors = {}, {}
        if reserve:
            rates = sorted({*RATES, *UNSEEN})
            answers = measure(evaluator, rates, agent.policy(rates))
        if config.strategy == "cacp":  # beside the policy in the tables; no candidate
            priors = measure(evaluator, rates, agent.mdp.prior(rates))
        found = find_winners(directory, answers, number, config.rates)
        about = measure_effort(directory, number, reserve) | describe_sitting(options, job.seed)
        test = read_split(config.data, "test")
        about |= {"policy": by_rate(answers), "prior": by_rate(priors)}
        report(files[waiting.pop(0)], found, base, prepared, test, about)
    loop.checkpoint(strategy)


def measure(evaluator: Evaluator, rates: Sequence[float], counts: Any) -> dict[float, Winner]:
    """Scores one allocation a rate."""
    found = {}
    for rate, row in zip(rates, counts.tolist(), strict=True):
        evaluator.submit(Candidate(0, rate, tuple(row)))
        found[rate] = (evaluator.results(0)[0].top1, (tuple(row), ""))
    return found


def by_rate(found: dict[float, Winner]) -> dict[str, float]:
    """The accuracies alone, for a file."""
    return {str(rate): top1 for rate, (top1, _) in found.items()}


def measure_effort(directory: RunDirectory, number: int, reserve: int) -> dict[str, Any]:
    """Evaluations, the policy's answers included, and what one of the search cost."""
    distinct = {row.subnet: row for row in reversed(directory.read_records())}
    rows = sorted(distinct.values(), key=lambda row: row.index)[:number]
    return {
        "evaluations": len(rows) + reserve,
        "images_scored": float(np.mean([row.images for row in rows])),
        "seconds": float(np.mean([row.seconds for row in rows])),
    }


def describe_sitting(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Options, versions, hardware, commit and seed of the search that ends now."""
    chosen = {name: getattr(options, name) for name in OPTIONS}
    # Wherever the data lies on this machine.
    chosen |= {name: "/".join(Path(chosen[name]).parts[-2:]) for name in SPLITS}
    return {"environment": {**describe_environment(seed), "options": chosen}}


def find_winners(
    directory: RunDirectory,
    answers: dict[float, Winner],
    number: int,
    rates: Sequence[float],
) -> dict[float, Winner]:
    """The best of the first `number` distinct candidates and of the policy, for each rate."""
    best: dict[float, Winner] = {}
    known: set[Subnet] = set()
    for record in directory.read_records():
        known.add(record.subnet)
        if len(known) > number:
            break
        # A cheaper candidate serves a larger rate too.
        for rate in rates:
            if record.cost_kept <= rate + 1e-9 and record.status == "ok":
                best[rate] = max(best.get(rate, NONE), (record.top1, record.subnet))
    return {rate: max(best[rate], answers.get(rate, NONE)) for rate in rates}


def report(
    file: Path,
    found: dict[float, Winner],
    base: Base,
    prepared: Prepared,
    test: ImageSet,
    about: dict[str, Any],
) -> None:
    """Writes accuracies, and image by image which the winners get right."""
    cutters = Cutters(prepared, "compensate")
    hits: dict[str, list[np.ndarray]] = {"search": [], "test": []}
    rows = []
    for rate, (top1, (counts, order)) in found.items():
        row: dict[str, Any] = {"rate": rate, "keep_counts": counts, "order": order, "top1": top1}
        for name, split in (("search", base.search), ("test", test)):
            images, labels = split.tensors()
            logits = predict(cutters[order].load(counts), images, 250, fast_dtype())
            is_right = (logits.argmax(1) == labels).numpy()
            hits[name].append(is_right)
            row[f"{name}_top1"] = float(is_right.mean())
        rows.append(row)
    np.savez_compressed(
        file.with_suffix(".npz"), **{name: np.packbits(each, axis=1) for name, each in hits.items()}
    )
    images = {"search": len(base.search), "test": len(test)}
    write_json(file, {"winners": rows, "images": images, **about})


if __name__ == "__main__":
    main()
