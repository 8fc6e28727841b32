"""Evaluators of one thread or of several: python bench/threads.py --networks resnet20 resnet50.

The cores of this machine are split into equal evaluators, each a process with its threads. All ways
score the same candidates in turn, round after round. Rates are relative to evaluators of one thread
each, as medians of the rounds. Memory is the proportional set size of an evaluator, with its share
of the images that all read.
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

CANDIDATES = 4  # for each core in a round
IMAGENET = ("resnet50", "mobilenet_v2")  # with random weights, on 64 images of 224 pixels


def prepare_network(network: str, images: int, seed: int) -> tuple[Any, Any]:
    """What candidates share, and the split that scores them."""
    from compensation import make_noise

    from cacp_ray.data.images import read_parquet
    from cacp_ray.evaluation.preparation import prepare
    from cacp_ray.models.factory import build_model
    from cacp_ray.models.pretrained import load_weights
    from cacp_ray.pruning.calibration import image_batches
    from cacp_ray.pruning.planner import make_plan
    from cacp_ray.pruning.statistics import collect_statistics

    if network in IMAGENET:
        model = build_model(f"torchvision:{network}", 1000).eval()
        split = make_noise(images, 224, seed)
        calibration = split.take(16)
    else:
        model = build_model(network, 10).eval()
        load_weights(model, f"embedded:{network}_cifar10")
        split, calibration = (
            read_parquet("embedded:search"),
            read_parquet("embedded:train", count=200),
        )
    x, y = calibration.tensors()
    plan = make_plan(model, x[:1])
    moments = collect_statistics(model, plan, image_batches(x, y), seed=seed, kinds=set())
    options = {"criterion": "l1", "recovery": "none", "seed": seed}
    return prepare(model, plan, calibration, moments, **options), split


def draw(plan: Any, count: int, rng: np.random.Generator) -> list[Any]:
    """Random candidates of random rates, each spending its budget."""
    from cacp_ray.config.run import PruningConfig
    from cacp_ray.evaluation.measurement import Candidate
    from cacp_ray.searching.budget import spend
    from cacp_ray.searching.strategies.random import scale_to_budget
    from cacp_ray.workflows.setup import make_budget

    budget = make_budget(plan, "macs", PruningConfig())
    least = budget.min_counts / budget.num_channels
    rates = rng.uniform(0.3, 0.7, count)
    ratios = rng.uniform(least, 1, (count, len(least)))
    chosen = spend(budget, scale_to_budget(budget, ratios, rates), rates).tolist()
    return [
        Candidate(float(rate), tuple(counts), index=index)
        for index, (rate, counts) in enumerate(zip(rates, chosen, strict=True))
    ]


def work(
    pipe: Connection, network: str, threads: int, seed: int, images: int = 64, gpu: float = 0.0
) -> None:
    """An evaluator that scores as many candidates as it is told and answers with its memory."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    from cacp_ray.evaluation.scorer import Scorer

    prepared, split = prepare_network(network, images, seed)
    score = Scorer(prepared, split, recovery="none", dtype="auto", threads=threads, gpu=gpu)
    pipe.send(None)
    rng = np.random.default_rng(seed)
    while (count := pipe.recv()) is not None:
        for candidate in draw(prepared.plan, count, rng):
            score(candidate)
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
