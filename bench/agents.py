"""Search strategies at equal evaluations: accuracy of their winners, before any fine-tuning.

python bench/agents.py --out OUT --groups all --evaluations 300 800 --seeds 0 1 2 \
    --train TRAIN.parquet --train-rows 0:45000 --search TRAIN.parquet --search-rows 45000:50000 \
    --test TEST.parquet --methods cacp cacp-paper amc random uniform hill_climb

All methods share the network, its order (`cap`), the recovery (compensation), the groups and the
images. An evaluation is one distinct candidate on the whole search split; a policy's answers at the
searched rates count as evaluations. Winners are chosen on the search split and measured once on the
test split.

Every run has a folder in --out, and the same command continues a benchmark that was killed. A run's
after-N.json holds its winners after N evaluations, its options, commit and machine. With several
numbers of evaluations, one search is read several times, except where a strategy's schedule depends
on the number. The sensitivity map of a network with many groups depends on it too: call the script
once for each number there. Searches share a cache of measurements, and an answer from it counts as
an evaluation; racing searches use no cache.
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

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.data import cifar10
from cacp_ray.data.images import ImageSet
from cacp_ray.evaluation.cache import CachedEvaluator, MeasurementCache, key_of_scores
from cacp_ray.evaluation.measurement import Candidate, Evaluator, LocalEvaluator, SubnetKey
from cacp_ray.evaluation.preparation import cut_networks
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.io.environment import describe_environment
from cacp_ray.io.files import write_json
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategies import prior
from cacp_ray.training.metrics import fast_dtype, predict
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits
from cacp_ray.workflows.strategy import find_policy, make_run_strategy, num_reserved

UNSEEN = (0.4, 0.6)
ROUND_SIZE = 6
# Settings of each method that differ from the defaults.
METHODS: dict[str, dict[str, Any]] = {
    "cacp": {},
    # No gradient step, so no screening either: elites and noise around the prior remain.
    "cacp, no learning": {"agent": {"updates_per_episode": 0}},
    "cacp, uniform prior": {},
    "cacp, no screening": {"agent": {"drafts": 1}},
    "cacp, no elites": {"agent": {"elite_share": 0.0}},
    # A search for each rate, a third of the evaluations each; agents_table.py joins the three.
    **{f"cacp, {rate} alone": {"rates": (rate,)} for rate in RATES},
    "process": {"strategy": "controls:make_process"},
    "hill_climb, sees the loss": {"strategy": "controls:make_hill_climb"},
    "cem, sees the loss": {"strategy": "controls:make_cem"},
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
# Methods whose schedule depends on the number of evaluations: each number is a search of its own.
SCHEDULED = ("cacp-paper", "amc", "amc, prior", "sequential, prior", "pcp", "greedy", "sensitivity")
# Options that the result of a search depends on; its folder's name says the rest.
SPLITS = ("train", "search", "test")
OPTIONS = ("model", "weights", "groups", *SPLITS, *(f"{name}_rows" for name in SPLITS))
Winner = tuple[float, SubnetKey]  # top1
NONE: Winner = (-1.0, ((), ""))


@dataclass(frozen=True)
class Job:
    """One search, whose winners are read at every milestone."""

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
    """Folder of one search; it names the number where the schedule depends on it."""
    name = method.replace(", ", "-").replace(" ", "-")
    return f"{name}-{evaluations}-seed-{seed}" if method in SCHEDULED else f"{name}-seed-{seed}"


def make_config(job: Job, options: argparse.Namespace) -> RunConfig:
    """Configuration of the run, with all groups prunable."""
    splits = {
        name: {"path": getattr(options, name), "rows": getattr(options, f"{name}_rows")}
        for name in SPLITS
    }
    values: dict[str, Any] = {
        "name": job.folder.name,
        "model": {"name": options.model, "weights": options.weights},
        "data": {**splits, "mean": cifar10.MEAN, "std": cifar10.STD},
        "rates": RATES,
        "evaluations": to_ask(job.method, job.milestones[-1]),
        "mode": "rounds",
        "round_size": ROUND_SIZE,
        "seed": job.seed,
        **METHODS[job.method],
    }
    return load_config(RunConfig, values)


def to_ask(method: str, evaluations: int) -> int:
    """Evaluations that a method gets: the same number a rate for all methods."""
    return evaluations * len(METHODS[method].get("rates", RATES)) // len(RATES)


def run(job: Job, options: argparse.Namespace) -> None:
    """Searches to the end and writes the winners at every milestone."""
    files = {n: job.folder / f"after-{n}.json" for n in job.milestones}
    if all(file.exists() for file in files.values()):
        return
    logging.getLogger().setLevel(logging.ERROR)
    # No setting switches the map off. Set it for every job: a process may run several.
    prior.MAP_SHARE = 0.0 if job.method.endswith("uniform prior") else MAP_SHARE
    torch.set_num_threads(1)
    config = make_config(job, options)
    setup = Setup.create(config)
    if options.groups == "inner":
        streams = [g.producers[0] for g in setup.plan.groups if g.is_residual]
        values = config.model_dump() | {"pruning": config.pruning.model_dump() | {"keep": streams}}
        config = load_config(RunConfig, values)
        setup = Setup.create(config)
    setup = setup.prepare()
    score = Scorer(setup.prepared, setup.search, recovery="compensate", dtype="auto", threads=1)
    evaluator: Evaluator = LocalEvaluator(score)
    if not config.evaluation.racing:  # a cached answer would hide the images that a race leaves out
        key = key_of_scores(
            setup.prepared, setup.search, recovery="compensate", dtype=str(fast_dtype())
        )
        cache = MeasurementCache(options.out / "cache", key)
        evaluator = CachedEvaluator(evaluator, cache, len(setup.search))
    directory = RunDirectory(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    strategy, reserve = make_run_strategy(setup), num_reserved(config)
    loop = SearchLoop(
        evaluator,
        setup.plan.cost_model,
        directory,
        rates=config.rates,
        evaluations=config.evaluations,
        reserved=reserve,
        mode="rounds",
        round_size=ROUND_SIZE,
        races=config.evaluation.racing,
    )
    loop.restore(strategy)
    waiting = [n for n in job.milestones if not files[n].exists()]
    while waiting:
        number = to_ask(job.method, waiting[0]) - reserve
        while not loop.done and loop.progress.evaluations < number:
            loop.tick(strategy)
        answers, priors = {}, {}
        rates = sorted({*RATES, *UNSEEN})
        agent: Any = find_policy(strategy)
        if agent is not None:
            answers = measure(evaluator, rates, agent.policy(rates))
        if config.strategy == "cacp":  # for the tables; never a winner
            priors = measure(evaluator, rates, agent.space.prior(rates))
        winners = find_winners(directory, answers, number, config.rates)
        about = measure_effort(directory, number, reserve) | describe_sitting(options, job.seed)
        test = Splits(config.data).read("test")
        about |= {"policy": by_rate(answers), "prior": by_rate(priors)}
        report(files[waiting.pop(0)], winners, setup, test, about)
    loop.checkpoint(strategy)


def measure(evaluator: Evaluator, rates: Sequence[float], counts: Any) -> dict[float, Winner]:
    """Scores one allocation a rate."""
    answers = {}
    for rate, row in zip(rates, counts.tolist(), strict=True):
        evaluator.submit(Candidate(rate, tuple(row), index=0))
        answers[rate] = (evaluator.results(0)[0].score, (tuple(row), ""))
    return answers


def by_rate(answers: dict[float, Winner]) -> dict[str, float]:
    """The accuracies alone, for a file."""
    return {str(rate): top1 for rate, (top1, _) in answers.items()}


def measure_effort(directory: RunDirectory, number: int, reserve: int) -> dict[str, Any]:
    """Evaluations with the policy's answers, and mean images and seconds of a candidate."""
    distinct = {row.key: row for row in reversed(directory.read_records())}
    rows = sorted(distinct.values(), key=lambda row: row.index)[:number]
    return {
        "evaluations": len(rows) + reserve,
        "images_scored": float(np.mean([row.images for row in rows])),
        "seconds": float(np.mean([row.seconds for row in rows])),
    }


def describe_sitting(options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Options, versions, hardware, commit and seed of the search that ends now."""
    chosen = {name: getattr(options, name) for name in OPTIONS}
    # The last two parts of a path: folders differ between machines.
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
    known: set[SubnetKey] = set()
    for record in directory.read_records():
        known.add(record.key)
        if len(known) > number:
            break
        # A cheaper candidate serves a larger rate too.
        for rate in rates:
            if record.cost_kept <= rate + 1e-9 and record.status == "ok":
                best[rate] = max(best.get(rate, NONE), (record.score, record.key))
    return {rate: max(best[rate], answers.get(rate, NONE)) for rate in rates}


def report(
    file: Path,
    winners: dict[float, Winner],
    setup: Setup,
    test: ImageSet,
    about: dict[str, Any],
) -> None:
    """Writes the accuracies of the winners, and which images they get right."""
    network = cut_networks(setup.prepared, "compensate")
    hits: dict[str, list[np.ndarray]] = {"search": [], "test": []}
    rows = []
    for rate, (top1, (counts, criterion)) in winners.items():
        row: dict[str, Any] = {
            "rate": rate,
            "keep_counts": counts,
            "order": criterion,
            "top1": top1,
        }
        for name, split in (("search", setup.search), ("test", test)):
            images, labels = split.tensors()
            logits = predict(network(criterion).load(counts), images, 250, fast_dtype())
            is_right = (logits.argmax(1) == labels).numpy()
            hits[name].append(is_right)
            row[f"{name}_top1"] = float(is_right.mean())
        rows.append(row)
    packed = {name: np.packbits(split_hits, axis=1) for name, split_hits in hits.items()}
    np.savez_compressed(file.with_suffix(".npz"), **packed)
    images = {"search": len(setup.search), "test": len(test)}
    write_json(file, {"winners": rows, "images": images, **about})


if __name__ == "__main__":
    main()
