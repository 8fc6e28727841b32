"""What a search would take, told before it begins: time, core-hours, memory."""

import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cacp_ray.config import RunConfig
from cacp_ray.evaluation.network import FastNetwork, default_batch_size, put_pixels
from cacp_ray.evaluation.preparation import Cutter, Prepared
from cacp_ray.evaluation.scorer import read_dtype
from cacp_ray.files import peak_memory
from cacp_ray.loading import Base
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.reporting.summary import format_seconds
from cacp_ray.searching.budget import uniform

REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """Of a search on evaluators whose cores are like this machine's.

    Attributes:
        evaluations: Of the search.
        images: Scored by one evaluation, racing left out.
        seconds_per_evaluation: At the mean of the rates.
        nodes: Of the cluster, now.
        places: For evaluators, on these nodes.
        evaluators: That work at once; on a cluster, which may grow, `cluster.max_evaluators`.
        threads: Of one evaluator.
        evaluator_bytes: Memory of one evaluator, the images left out.
        split_bytes: Decoded images, once on every machine.
    """

    evaluations: int
    images: int
    seconds_per_evaluation: float
    nodes: int
    places: int
    evaluators: int
    threads: int
    evaluator_bytes: int
    split_bytes: int

    @property
    def seconds(self) -> float:
        """Of the evaluations, evaluators always busy."""
        return self.evaluations * self.seconds_per_evaluation / self.evaluators

    @property
    def core_hours(self) -> float:
        """For a bill: times the price of a core for an hour."""
        return self.evaluations * self.seconds_per_evaluation * self.threads / 3600


def estimate_search(
    config: RunConfig, base: Base, cpus: Sequence[float], *, can_grow: bool
) -> Estimate:
    """What a search would take on nodes of so many CPUs, of a cluster that `can_grow` or not.

    Times uniform subnets of all rates on a batch of the search split, on an evaluator's threads.

    The memory is this process's largest, which holds and runs what an evaluator does.
    """
    images = min(config.evaluation.images or len(base.search), len(base.search))
    batch = min(config.evaluation.batch_size or default_batch_size(base.search), images)
    per_image = time_image(config, base, batch)
    threads = config.cluster.cpus_per_evaluator
    places = sum(int(each // threads) for each in cpus)
    wanted = config.cluster.max_evaluators or places
    split_bytes = base.search.images.nbytes
    return Estimate(
        evaluations=config.evaluations,
        images=images,
        seconds_per_evaluation=per_image * images,
        nodes=len(cpus),
        places=places,
        evaluators=max(1, min(wanted if can_grow else min(wanted, places), config.evaluations)),
        threads=threads,
        evaluator_bytes=max(0, peak_memory() - split_bytes),
        split_bytes=split_bytes,
    )


def time_image(config: RunConfig, base: Base, batch: int) -> float:
    """Seconds of an image of a batch, as candidates are scored: mean over the rates."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.cluster.cpus_per_evaluator)
    tensors = {name: value.numpy() for name, value in all_tensors(base.model).items()}
    part = base.search.take(batch)
    prepared = Prepared(base.model, base.plan, (), tensors, {}, part)
    rows = uniform(base.budget, config.rates, np.ones(len(base.budget.num_channels)))
    seconds = 0.0
    try:
        network = FastNetwork(Cutter(prepared, "none"), read_dtype(config.evaluation.dtype))
        pixels = put_pixels(part)
        for counts in rows.tolist():
            predict = network.load(counts, batch)
            times = []
            for _ in range(REPEATS):
                started = time.perf_counter()
                predict(pixels, 0, batch)
                times.append(time.perf_counter() - started)
            seconds += statistics.median(times)
    finally:
        torch.set_num_threads(before)
    return seconds / (batch * len(rows))


def describe_estimate(found: Estimate, gpu_share: float, price: float | None = None) -> list[str]:
    """Lines for a user.

    Args:
        found: The estimate.
        gpu_share: Of a GPU, that the run asks for.
        price: Of a core for an hour, in any currency.
    """
    rest = math.ceil(found.split_bytes / 2**20)
    memory = (
        f"memory: about {found.evaluator_bytes / 2**30:.1f} GB an evaluator, and on each machine "
        f"{rest:,} MB of images and what candidates share, a few times the weights"
    )
    if gpu_share:
        return [
            f"{found.evaluations:,} evaluations of {found.images:,} images; on GPUs "
            "(cluster.gpus_per_evaluator) neither time nor price nor room is estimated",
            f"nodes: {found.nodes}",
            memory,
        ]
    cores = "core" if found.threads == 1 else "cores"
    return [
        f"an evaluation: {found.images:,} images, about {found.seconds_per_evaluation:.2f} s on "
        f"{found.threads} {cores} of this machine",
        f"{found.evaluations:,} evaluations: about {format_seconds(found.seconds)} with "
        f"{found.evaluators} evaluators, {found.core_hours:.2g} core-hours; start, learning, "
        "repair of the winners and fine-tuning come on top",
        *(
            []
            if price is None
            else [
                f"price: about {found.core_hours * price:.2f} for the evaluations, at {price:g} a "
                "core-hour"
            ]
        ),
        f"room now: {found.places} evaluators at once, nodes: {found.nodes}",
        memory,
    ]
