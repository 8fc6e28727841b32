"""What a search would take: time, core-hours or GPU-hours, memory, measured on a few batches."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.gpu import Need, gpu_batch_size
from cacp_ray.evaluation.network import FastNetwork, default_batch_size, put_pixels
from cacp_ray.evaluation.preparation import CutNetwork, Prepared
from cacp_ray.evaluation.scorer import measure_need, read_dtype
from cacp_ray.io.environment import peak_memory
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.reporting.summary import format_seconds
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.strategies.table import OTHER_ORDERS
from cacp_ray.workflows.setup import Setup

if TYPE_CHECKING:
    from cacp_ray.distributed.nodes import Nodes

REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """What a search would take on cores like this machine's, or on a cluster's GPUs.

    Attributes:
        evaluations: Evaluations of the search.
        images: Images scored in one evaluation, without racing.
        seconds_per_evaluation: Mean over the rates; on a GPU, for one evaluator alone on it.
        nodes: Nodes of the cluster now.
        places: Evaluators that these nodes have room for.
        evaluators: Evaluators that work at once; a cluster may grow to `cluster.max_evaluators`.
        threads: Threads of one evaluator.
        evaluator_bytes: Memory of one evaluator; on a GPU it includes the images.
        split_bytes: Decoded images, held once on every machine.
        gpus: GPUs that score; 0 where cores do.
        gpu_bytes: Memory of the smallest of these GPUs.
        share: Share of a GPU for each evaluator.
    """

    evaluations: int
    images: int
    seconds_per_evaluation: float
    nodes: int
    places: int
    evaluators: int
    threads: int
    evaluator_bytes: float
    split_bytes: int
    gpus: int = 0
    gpu_bytes: float = 0.0
    share: float = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of the evaluations with evaluators always busy; those on one GPU take turns."""
        at_once = min(self.evaluators, self.gpus) if self.gpus else self.evaluators
        return self.evaluations * self.seconds_per_evaluation / at_once

    @property
    def hours(self) -> float:
        """Core-hours or GPU-hours, the unit of a bill."""
        units = 1 if self.gpus else self.threads
        return self.evaluations * self.seconds_per_evaluation * units / 3600


@dataclass(frozen=True)
class GpuFigures:
    """What was measured on a GPU: an evaluator's memory, and seconds an image of a batch."""

    need: Need
    seconds_per_image: float


def estimate_search(setup: Setup, cpus: Sequence[float], *, can_grow: bool) -> Estimate:
    """Estimates a search on CPUs from uniform subnets of all rates, timed on one batch.

    The memory is this process's peak: it holds and runs what an evaluator does.
    """
    images = setup.num_images
    batch = min(setup.config.evaluation.batch_size or default_batch_size(setup.search), images)
    before = torch.get_num_threads()
    torch.set_num_threads(setup.config.cluster.cpus_per_evaluator)
    try:
        seconds_per_image = time_image(
            *_parts(setup, batch), batch, read_dtype(setup.config.evaluation.dtype), "cpu"
        )
    finally:
        torch.set_num_threads(before)
    threads = setup.config.cluster.cpus_per_evaluator
    places = sum(int(count // threads) for count in cpus)
    split_bytes = setup.search.images.nbytes
    return Estimate(
        evaluations=setup.config.evaluations,
        images=images,
        seconds_per_evaluation=seconds_per_image * images,
        nodes=len(cpus),
        places=places,
        evaluators=_at_once(setup, places, can_grow=can_grow),
        threads=threads,
        evaluator_bytes=max(0, peak_memory() - split_bytes),
        split_bytes=split_bytes,
    )


def gpu_arguments(setup: Setup) -> dict[str, Any]:
    """Arguments of `measure_gpu`: a part of the search split, and the bytes of the rest."""
    height, width = setup.search.images.shape[1:3]
    batch = setup.config.evaluation.batch_size or gpu_batch_size(height * width, len(setup.search))
    prepared, part, rows = _parts(setup, batch)
    rest = setup.search.images.nbytes - part.images.nbytes
    if setup.config.pruning.recovery == "compensate":
        rest += CACHE_BYTES * (1 + len(OTHER_ORDERS.get(setup.config.strategy, ())))
    return {
        "prepared": prepared,
        "part": part,
        "rows": rows,
        "batch": min(batch, len(part)),
        "rest": rest,
        "dtype": setup.config.evaluation.dtype,
    }


def measure_gpu(
    prepared: Prepared,
    part: ImageSet,
    rows: Sequence[Sequence[int]],
    *,
    batch: int,
    rest: int,
    dtype: str,
) -> GpuFigures:
    """Measures on the GPU that this process has; arguments of `gpu_arguments`.

    Raises:
        EvaluationError: Memory cannot be measured, or a batch does not fit.
    """
    need = measure_need(prepared, part, recovery="none", batch_size=batch, dtype=dtype)
    try:
        seconds = time_image(prepared, part, rows, batch, read_dtype(dtype, "cuda"), "cuda")
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"a batch of {batch} images does not fit into a GPU's memory: set "
            "evaluation.batch_size to a smaller one"
        ) from error
    finally:
        torch.cuda.empty_cache()  # the process may be a notebook's
    return GpuFigures(Need(need.evaluator + rest, need.gpu), seconds)


def estimate_on_gpus(
    setup: Setup,
    figures: Mapping[str, GpuFigures],
    nodes: "Nodes",
    *,
    can_grow: bool,
) -> Estimate:
    """What a search would take on the GPUs of a cluster."""
    from cacp_ray.distributed.nodes import Kind, find_share

    images, threads = setup.num_images, setup.config.cluster.cpus_per_evaluator
    share = setup.config.cluster.gpus_per_evaluator
    if share == "auto":
        needs = {node: measured.need for node, measured in figures.items()}
        share = find_share(needs, nodes, threads)
    kind = Kind(threads, share)
    places = {node: kind.room(nodes, node) for node in figures if node in nodes.gpus}
    gpus = sum(min(int(nodes.gpus[node]), room) for node, room in places.items())
    return Estimate(
        evaluations=setup.config.evaluations,
        images=images,
        seconds_per_evaluation=images * max(gpu.seconds_per_image for gpu in figures.values()),
        nodes=len(nodes.cpus),
        places=sum(places.values()),
        evaluators=_at_once(setup, sum(places.values()), can_grow=can_grow),
        threads=threads,
        evaluator_bytes=max(gpu.need.evaluator for gpu in figures.values()),
        split_bytes=setup.search.images.nbytes,
        gpus=max(1, gpus),
        gpu_bytes=min(gpu.need.gpu for gpu in figures.values()),
        share=share,
    )


def time_image(
    prepared: Prepared,
    part: ImageSet,
    rows: Sequence[Sequence[int]],
    batch: int,
    dtype: torch.dtype,
    device: str,
) -> float:
    """Seconds of an image of a batch, as candidates are scored: mean over rows of keep counts."""
    seconds = 0.0
    network, pixels = (
        FastNetwork(CutNetwork(prepared, "none", device), dtype),
        put_pixels(part, device),
    )
    for counts in rows:
        predict = network.load(counts, batch)
        predict(pixels, 0, batch)
        times = []
        for _ in range(REPEATS):
            started = time.perf_counter()
            predict(pixels, 0, batch)
            times.append(time.perf_counter() - started)
        seconds += statistics.median(times)
    return seconds / (batch * len(rows))


def _parts(setup: Setup, batch: int) -> tuple[Prepared, ImageSet, list[list[int]]]:
    """What `time_image` needs: the network unrepaired, images, uniform subnets of the rates."""
    part = setup.search.take(batch)
    tensors = {name: value.numpy() for name, value in all_tensors(setup.model).items()}
    rows = uniform(setup.budget, setup.config.rates, np.ones(len(setup.budget.num_channels)))
    return Prepared(setup.model, setup.plan, (), tensors, {}, part), part, rows.tolist()


def _at_once(setup: Setup, places: int, *, can_grow: bool) -> int:
    wanted = setup.config.cluster.max_evaluators or places
    return max(1, min(wanted if can_grow else min(wanted, places), setup.config.evaluations))


def describe_estimate(estimate: Estimate, price: float | None = None) -> list[str]:
    """Lines for a user."""
    if estimate.gpus:
        unit, where = "GPU", "a GPU of this cluster"
        evaluators = f"{estimate.evaluators} evaluators on {estimate.gpus} GPU"
        evaluators += "s" if estimate.gpus > 1 else ""
        gpu_memory = f", of {estimate.gpu_bytes / 2**30:.0f} GB of a GPU"
    else:
        cores = "core" if estimate.threads == 1 else "cores"
        unit, where = "core", f"{estimate.threads} {cores} of this machine"
        evaluators, gpu_memory = f"{estimate.evaluators} evaluators", ""
    lines = [
        f"an evaluation: {estimate.images:,} images, about "
        f"{estimate.seconds_per_evaluation:.2f} s on {where}",
        f"{estimate.evaluations:,} evaluations: about {format_seconds(estimate.seconds)} with "
        f"{evaluators}, {estimate.hours:.2g} {unit}-hours; start, learning, repair of the winners "
        "and fine-tuning come on top",
    ]
    if price is not None:
        total = _amount(estimate.hours * price)
        lines.append(f"price: {total} for the evaluations, at {price:g} a {unit}-hour")
    lines += [
        f"room now: {estimate.places} evaluators at once, nodes: {estimate.nodes}",
        f"memory: about {estimate.evaluator_bytes / 2**30:.1f} GB an evaluator{gpu_memory}, and on "
        f"each machine {math.ceil(estimate.split_bytes / 2**20):,} MB of images and what "
        "candidates share, a few times the weights",
    ]
    if estimate.gpus and estimate.share * estimate.gpu_bytes < estimate.evaluator_bytes:
        lines.append(
            f"{estimate.share:g} of a GPU is less than an evaluator needs for batches that keep it "
            "busy: it takes smaller ones, or fails where nothing fits"
        )
    return lines


def _amount(price: float) -> str:
    return f"about {price:.2f}" if price >= 0.01 else "less than 0.01"
