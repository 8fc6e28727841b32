"""Memory of evaluators, as a search starts them: python bench/memory.py --candidates 40.

Ray actors of one thread score random candidates of ResNet-50 on 64 images of 224 pixels, repaired
by least squares as by default. They note their proportional set size, which includes their share of
the images, weights and factors that all actors of the machine read.
"""

import argparse
import dataclasses
from typing import Any

import numpy as np
import torch
from compensation import make_noise
from report import positive, print_environment, print_table
from threads import read_memory

from cacp_ray.config.run import PruningConfig
from cacp_ray.distributed import cluster
from cacp_ray.distributed.actors import RayActors
from cacp_ray.distributed.pool import RayEvaluatorPool
from cacp_ray.evaluation.measurement import Candidate, Measurement, ScoreFunction
from cacp_ray.evaluation.preparation import prepare
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.calibration import image_batches
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics import collect_statistics
from cacp_ray.searching.budget import spend
from cacp_ray.searching.strategies.random import scale_to_budget
from cacp_ray.workflows.setup import make_budget

IMAGES, CALIBRATION = 64, 16


def make_watched(**arguments: Any) -> ScoreFunction:
    """`Scorer`, with the GB that the process takes as the loss."""
    score = Scorer(**arguments)

    def watched(candidate: Candidate) -> Measurement:
        return dataclasses.replace(score(candidate), loss=read_memory())

    return watched


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--candidates", type=positive, default=40, help="for each evaluator")
    parser.add_argument("--evaluators", type=positive, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = build_model("torchvision:resnet50", 1000).eval()
    split = make_noise(IMAGES, 224, options.seed)
    calibration = split.take(CALIBRATION)
    images, labels = calibration.tensors()
    plan = make_plan(model, images[:1])
    moments = collect_statistics(
        model, plan, image_batches(images, labels), seed=options.seed, kinds={"inputs"}
    )
    budget = make_budget(plan, "macs", PruningConfig())
    rng = np.random.default_rng(options.seed)
    least = budget.min_counts / budget.num_channels
    cluster.connect("local", num_cpus=options.evaluators)
    rows = []
    for recovery in ("none", "compensate"):
        prepared = prepare(
            model, plan, calibration, moments, criterion="l1", recovery=recovery, seed=options.seed
        )
        pool = RayEvaluatorPool(
            RayActors(make_watched, {
                "prepared": prepared, "split": split, "recovery": recovery, "dtype": "auto",
                "threads": 1,
            }),
            num_evaluators=options.evaluators,
            cpus_per_evaluator=1,
        )  # fmt: skip
        number = options.candidates * options.evaluators
        rates = rng.uniform(0.3, 0.7, number)
        ratios = rng.uniform(least, 1, (number, len(least)))
        for index, counts in enumerate(
            spend(budget, scale_to_budget(budget, ratios, rates), rates).tolist()
        ):
            pool.submit(Candidate(float(rates[index]), tuple(counts), index=index))
        memory: list[float] = []
        while len(memory) < number:
            memory += [measurement.loss for measurement in pool.results(60.0)]
        pool.close()
        first = memory[: 2 * options.evaluators]
        rows.append([recovery, f"{max(first):.2f} GB", f"{max(memory):.2f} GB"])
    header = ["recovery", "after two candidates", f"after {options.candidates}, most"]
    print_table(f"An evaluator of ResNet-50, of {options.evaluators} on the machine", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
