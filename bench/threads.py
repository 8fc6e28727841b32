"""Evaluators of one thread or of several: python bench/threads.py --networks resnet20 resnet50.

The cores of this machine are split into equal evaluators, each a process with its threads, and all
ways score the same candidates in turn, round after round. Rates are over those of one thread each,
medians of the rounds; memory is what an evaluator takes (proportional set size, with its share of
the images that all read).
"""

import argparse
import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from report import positive, print_environment, print_table

CANDIDATES = 4  # a round, for each core
IMAGENET = ("resnet50", "mobilenet_v2")  # with random weights, on 64 images of 224 pixels


def work(pipe: Connection, network: str, threads: int, seed: int) -> None:
    """An evaluator: scores the keep counts that it is sent, and answers with its memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from compensation import make_noise

    from cacp_ray.config import PruningConfig
    from cacp_ray.data.images import read_parquet
    from cacp_ray.evaluation.measurement import Candidate
    from cacp_ray.evaluation.preparation import prepare
    from cacp_ray.evaluation.scorer import make_scorer
    from cacp_ray.loading import make_budget
    from cacp_ray.models.factory import build_model, load_weights
    from cacp_ray.pruning.plan import make_plan
    from cacp_ray.pruning.statistics import collect_statistics
    from cacp_ray.searching.budget import spend
    from cacp_ray.searching.strategies.random import scale_to_budget

    if network in IMAGENET:
        model = build_model(f"torchvision:{network}", 1000).eval()
        split = make_noise(64, 224, seed)
        calibration = split.take(16)
    else:
        model = build_model(network, 10).eval()
        load_weights(model, f"embedded:{network}_cifar10")
        split, calibration = (
            read_parquet("embedded:search"),
            read_parquet("embedded:train", count=200),
        )
    images, labels = calibration.tensors()
    plan = make_plan(model, images[:1])
    statistics_ = collect_statistics(model, plan, images, labels, seed=seed, kinds=set())
    prepared = prepare(
        model, plan, calibration, statistics_, criterion="l1", recovery="none", seed=seed
    )
    score = make_scorer(prepared, split, recovery="none", dtype="auto", threads=threads)
    budget = make_budget(plan, "macs", PruningConfig())
    del images, labels
    pipe.send(None)
    rng = np.random.default_rng(seed)
    least = budget.min_counts / budget.num_channels
    while (count := pipe.recv()) is not None:
        rates = rng.uniform(0.3, 0.7, count)
        ratios = rng.uniform(least, 1, (count, len(least)))
        chosen = spend(budget, scale_to_budget(budget, ratios, rates), rates).tolist()
        for index, counts in enumerate(chosen):
            score(Candidate(index, float(rates[index]), tuple(counts)))
        pipe.send(read_memory())


def read_memory() -> float:
    """Proportional set size of this process in GB."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--networks", nargs="+", choices=("resnet20", *IMAGENET), default=["resnet20", "resnet50"]
    )
    parser.add_argument("--cores", type=positive, default=os.cpu_count())
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    ways = [n for n in range(1, options.cores + 1) if options.cores % n == 0]
    rows = []
    for network in options.networks:
        evaluators: dict[int, list[Any]] = {}
        for threads in ways:
            evaluators[threads] = []
            for index in range(options.cores // threads):
                ours, theirs = spawn.Pipe()
                arguments = (theirs, network, threads, options.seed + index)
                spawn.Process(target=work, args=arguments, daemon=True).start()
                ours.recv()
                evaluators[threads].append(ours)
        seconds: dict[int, list[float]] = {threads: [] for threads in ways}
        memory: dict[int, float] = {}
        for number in range(options.rounds + 1):
            for threads, pipes in evaluators.items():
                started = time.monotonic()
                for pipe in pipes:
                    pipe.send(CANDIDATES * options.cores // len(pipes))
                memory[threads] = max(pipe.recv() for pipe in pipes)
                if number:  # the first warms up
                    seconds[threads].append(time.monotonic() - started)
        for pipes in evaluators.values():
            for pipe in pipes:
                pipe.send(None)
        for threads in ways:
            pairs = zip(seconds[1], seconds[threads], strict=True)
            ratio = statistics.median(one / this for one, this in pairs)
            rate = CANDIDATES * options.cores / statistics.median(seconds[threads])
            rows.append(
                [
                    network, f"{options.cores // threads} x {threads}", f"{rate:.2f}",
                    f"{ratio:.2f}x", f"{memory[threads]:.2f} GB",
                ]
            )  # fmt: skip
    header = [
        "network",
        "evaluators x threads",
        "candidates a second",
        "over one thread each",
        "memory each",
    ]
    print_table(f"Evaluators on {options.cores} cores", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()
