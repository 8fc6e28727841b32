"""What a search would take, told before it begins: time, core-hours or GPU-hours, memory."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cacp_ray.config import RunConfig
from cacp_ray.data.images import ImageSet
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.gpu import Need, liked_batch
from cacp_ray.evaluation.network import FastNetwork, default_batch_size, put_pixels
from cacp_ray.evaluation.preparation import Cutter, Prepared
from cacp_ray.evaluation.scorer import measure_need, read_dtype
from cacp_ray.files import peak_memory
from cacp_ray.loading import Base
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.reporting.summary import format_seconds
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.strategies import OTHER_ORDERS

if TYPE_CHECKING:
    from cacp_ray.distributed.nodes import Nodes

REPEATS = 3


@dataclass(frozen=True)
class Estimate:
    """Of a search on evaluators whose cores are like this machine's, or on a cluster's GPUs.

    Attributes:
        evaluations: Of the search.
        images: Scored by one evaluation, racing left out.
        seconds_per_evaluation: At the mean of the rates; on a GPU, by one evaluator alone on it.
        nodes: Of the cluster, now.
        places: For evaluators, on these nodes.
        evaluators: That work at once; on a cluster, which may grow, `cluster.max_evaluators`.
        threads: Of one evaluator.
        evaluator_bytes: Memory of one evaluator, the images left out; on a GPU, they are in it.
        split_bytes: Decoded images, once on every machine.
        gpus: That score; 0: cores do.
        gpu_bytes: Memory of the smallest of them.
        share: Of a GPU, for each evaluator.
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
        """Of the evaluations, evaluators always busy; those on one GPU take turns."""
        at_once = min(self.evaluators, self.gpus) if self.gpus else self.evaluators
        return self.evaluations * self.seconds_per_evaluation / at_once

    @property
    def hours(self) -> float:
        """Of cores or GPUs, for a bill: times the price of one for an hour."""
        each = 1 if self.gpus else self.threads
        return self.evaluations * self.seconds_per_evaluation * each / 3600


@dataclass(frozen=True)
class GpuFigures:
    """What was measured on a GPU: an evaluator's memory, and seconds an image of a batch."""

    need: Need
    seconds_per_image: float


def estimate_search(
    config: RunConfig, base: Base, cpus: Sequence[float], *, can_grow: bool
) -> Estimate:
    """What a search would take on nodes of so many CPUs, of a cluster that `can_grow` or not.

    Times uniform subnets of all rates on a batch of the search split, on an evaluator's threads.

    The memory is this process's largest, which holds and runs what an evaluator does.
    """
    images = _images(config, base)
    batch = min(config.evaluation.batch_size or default_batch_size(base.search), images)
    before = torch.get_num_threads()
    torch.set_num_threads(config.cluster.cpus_per_evaluator)
    try:
        each = time_image(
            *_parts(config, base, batch), batch, read_dtype(config.evaluation.dtype), "cpu"
        )
    finally:
        torch.set_num_threads(before)
    threads = config.cluster.cpus_per_evaluator
    places = sum(int(each // threads) for each in cpus)
    split_bytes = base.search.images.nbytes
    return Estimate(
        evaluations=config.evaluations,
        images=images,
        seconds_per_evaluation=each * images,
        nodes=len(cpus),
        places=places,
        evaluators=_at_once(config, places, can_grow=can_grow),
        threads=threads,
        evaluator_bytes=max(0, peak_memory() - split_bytes),
        split_bytes=split_bytes,
    )


def gpu_arguments(config: RunConfig, base: Base) -> dict[str, Any]:
    """Of `measure_gpu`: a part of the search split, and the bytes of what is left out."""
    height, width = base.search.images.shape[1:3]
    batch = config.evaluation.batch_size or liked_batch(height * width, len(base.search))
    prepared, part, rows = _parts(config, base, batch)
    rest = base.search.images.nbytes - part.images.nbytes
    if config.pruning.recovery == "compensate":
        rest += CACHE_BYTES * (1 + len(OTHER_ORDERS.get(config.strategy, ())))
    return {
        "prepared": prepared,
        "part": part,
        "rows": rows,
        "batch": min(batch, len(part)),
        "rest": rest,
        "dtype": config.evaluation.dtype,
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
        EvaluationError: As of `measure_need`, or a batch does not fit.
    """
    found = measure_need(prepared, part, recovery="none", batch_size=batch, dtype=dtype)
    try:
        each = time_image(prepared, part, rows, batch, read_dtype(dtype, "cuda"), "cuda")
    except torch.OutOfMemoryError as error:
        raise EvaluationError(
            f"a batch of {batch} images does not fit into a GPU's memory: set "
            "evaluation.batch_size to a smaller one"
        ) from error
    finally:
        torch.cuda.empty_cache()  # the process may be a notebook's
    return GpuFigures(Need(found.evaluator + rest, found.gpu), each)


def estimate_on_gpus(
    config: RunConfig,
    base: Base,
    figures: Mapping[str, GpuFigures],
    nodes: "Nodes",
    *,
    can_grow: bool,
) -> Estimate:
    """What a search would take on the GPUs of a cluster.

    Args:
        config: Of the search.
        base: Its network and images.
        figures: Measured on a GPU of each node, at least of one.
        nodes: The cluster's.
        can_grow: Whether nodes may join.
    """
    from cacp_ray.distributed.gpus import find_share
    from cacp_ray.distributed.slots import Kind

    images, threads = _images(config, base), config.cluster.cpus_per_evaluator
    share = config.cluster.gpus_per_evaluator
    if share == "auto":
        needs = {node: each.need for node, each in figures.items()}
        share = find_share(needs, nodes, threads)
    kind = Kind(threads, share)
    places = {node: kind.room(nodes, node) for node in figures if node in nodes.gpus}
    gpus = sum(min(int(nodes.gpus[node]), room) for node, room in places.items())
    return Estimate(
        evaluations=config.evaluations,
        images=images,
        seconds_per_evaluation=images * max(each.seconds_per_image for each in figures.values()),
        nodes=len(nodes.cpus),
        places=sum(places.values()),
        evaluators=_at_once(config, sum(places.values()), can_grow=can_grow),
        threads=threads,
        evaluator_bytes=max(each.need.evaluator for each in figures.values()),
        split_bytes=base.search.images.nbytes,
        gpus=max(1, gpus),
        gpu_bytes=min(each.need.gpu for each in figures.values()),
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
    network, pixels = FastNetwork(Cutter(prepared, "none", device), dtype), put_pixels(part, device)
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


def _parts(config: RunConfig, base: Base, batch: int) -> tuple[Prepared, ImageSet, list[list[int]]]:
    """What `time_image` needs: the network unrepaired, images, uniform subnets of the rates."""
    part = base.search.take(batch)
    tensors = {name: value.numpy() for name, value in all_tensors(base.model).items()}
    rows = uniform(base.budget, config.rates, np.ones(len(base.budget.num_channels)))
    return Prepared(base.model, base.plan, (), tensors, {}, part), part, rows.tolist()


def _images(config: RunConfig, base: Base) -> int:
    return min(config.evaluation.images or len(base.search), len(base.search))


def _at_once(config: RunConfig, places: int, *, can_grow: bool) -> int:
    wanted = config.cluster.max_evaluators or places
    return max(1, min(wanted if can_grow else min(wanted, places), config.evaluations))


def describe_estimate(found: Estimate, price: float | None = None) -> list[str]:
    """Lines for a user.

    Args:
        found: The estimate.
        price: Of a core, or where GPUs score of a GPU, for an hour, in any currency.
    """
    rest = math.ceil(found.split_bytes / 2**20)
    memory = f"memory: about {found.evaluator_bytes / 2**30:.1f} GB an evaluator"
    if found.gpus:
        unit, memory = "GPU", f"{memory}, of {found.gpu_bytes / 2**30:.0f} GB of a GPU"
        where = "a GPU of this cluster"
    else:
        unit, cores = "core", "core" if found.threads == 1 else "cores"
        where = f"{found.threads} {cores} of this machine"
    on_gpus = f" on {found.gpus} GPUs" if found.gpus > 1 else " on 1 GPU" if found.gpus else ""
    return [
        f"an evaluation: {found.images:,} images, about {found.seconds_per_evaluation:.2f} s on "
        f"{where}",
        f"{found.evaluations:,} evaluations: about {format_seconds(found.seconds)} with "
        f"{found.evaluators} evaluators{on_gpus}, {found.hours:.2g} {unit}-hours; start, learning, "
        "repair of the winners and fine-tuning come on top",
        *(
            []
            if price is None
            else [
                f"price: {_amount(found.hours * price)} for the evaluations, at {price:g} a "
                f"{unit}-hour"
            ]
        ),
        f"room now: {found.places} evaluators at once, nodes: {found.nodes}",
        f"{memory}, and on each machine {rest:,} MB of images and what candidates share, a few "
        "times the weights",
        *(
            [
                f"{found.share:g} of a GPU is less than an evaluator needs for batches that keep "
                "it busy: it takes smaller ones, or fails where nothing fits"
            ]
            if found.gpus and found.share * found.gpu_bytes < found.evaluator_bytes
            else []
        ),
    ]


def _amount(price: float) -> str:
    return f"about {price:.2f}" if price >= 0.01 else "less than 0.01"
