"""What a search leaves: the policy's answers, and the winner of every rate, built and measured."""

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from cacp_ray.config import RunConfig
from cacp_ray.data.images import ImageSet
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.building import Builder, Built
from cacp_ray.evaluation.latency import Latency, measure_latency, speedup
from cacp_ray.evaluation.measurement import Candidate, Evaluator, Measurement, Subnet
from cacp_ray.evaluation.preparation import Prepared
from cacp_ray.loading import Base
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.pruning.subnet import describe_kept, load_subnet, save_subnet
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.records import EpisodeRecord, make_record

logger = logging.getLogger(__name__)

Build = Callable[[Sequence[Subnet]], Iterable[Built]]

LATENCY_BATCH = 64
FRONTIER = tuple(round(0.2 + 0.05 * step, 2) for step in range(15))


def measure_candidates(
    evaluator: Evaluator, candidates: Sequence[Candidate]
) -> dict[int, Measurement]:
    """Scores candidates outside the search; by index, without those that failed."""
    for candidate in candidates:
        evaluator.submit(candidate)
    found: dict[int, Measurement] = {}
    while len(found) < len(candidates):
        found |= {each.index: each for each in evaluator.results(10.0)}
    for index, failed in found.items():
        if failed.status != "ok":
            rate = next(each.rate for each in candidates if each.index == index)
            logger.warning("a final measurement at rate %.2f failed: %s", rate, failed.error)
    return {index: each for index, each in found.items() if each.status == "ok"}


def measure_policy(
    policy: Callable[[Sequence[float]], Any], base: Base, config: RunConfig, evaluator: Evaluator
) -> list[dict[str, Any]]:
    """What the policy answers at the run's rates and from 0.2 to 0.9, without any search."""
    budget = base.budget
    grid = sorted({*FRONTIER, *config.rates})
    rates = [rate for rate in grid if budget.limit(rate) >= budget.smallest]
    logger.info(
        "the policy answers: %d rates, of which %d count as the last evaluations",
        len(rates),
        len(config.rates),
    )
    counts = np.asarray(policy(rates))
    candidates = [
        Candidate(index, rate, tuple(row), images=len(base.search))
        for index, (rate, row) in enumerate(zip(rates, counts.tolist(), strict=True))
    ]
    found = measure_candidates(evaluator, candidates)
    return [
        {
            "rate": candidate.rate,
            "cost_kept": int(budget.cost(np.array(candidate.keep_counts))) / budget.total,
            "macs": int(base.plan.macs(candidate.keep_counts)),
            "top1": found[candidate.index].top1,
            "record": as_record(base, config, candidate, found[candidate.index]),
        }
        for candidate in candidates
        if candidate.index in found
    ]


def measure_uniform(base: Base, config: RunConfig, evaluator: Evaluator) -> dict[float, float]:
    """Top-1 of the same keep ratio in all groups, by rate: the reference of a report.

    Outside the search: it is no evaluation, and nothing is chosen by it.
    """
    rows = uniform(base.budget, config.rates, np.ones(len(base.budget.num_channels)))
    candidates = [
        Candidate(index, rate, tuple(row), images=len(base.search))
        for index, (rate, row) in enumerate(zip(config.rates, rows.tolist(), strict=True))
    ]
    found = measure_candidates(evaluator, candidates)
    return {each.rate: found[each.index].top1 for each in candidates if each.index in found}


def as_record(
    base: Base, config: RunConfig, candidate: Candidate, found: Measurement
) -> EpisodeRecord:
    """A measurement of the policy's answer, as the search records its own."""
    return make_record(
        candidate, found, base.plan.cost_model, cost=config.cost, strategy=config.strategy
    )


def builder_settings(config: RunConfig) -> dict[str, Any]:
    """Of `Builder`, as a run has them."""
    pruning = config.pruning
    return {
        "recovery": pruning.recovery,
        "sequential": pruning.sequential,
        "seed": config.seed,
    }


def build_here(config: RunConfig, prepared: Prepared, split: ImageSet) -> Build:
    """Builds one after another in this process."""
    return partial(map, Builder(prepared, split, **builder_settings(config)))


def build_winners(
    config: RunConfig,
    base: Base,
    prepared: Prepared,
    searched: Mapping[float, EpisodeRecord | None],
    run_dir: Path,
    build: Build,
    answers: Sequence[dict[str, Any]] = (),
    reference: Mapping[float, float] | None = None,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Builds, measures in float32 on the search split, and saves the best subnet of every rate.

    Where a policy has answered a rate, its subnet and that of the search's best are both built, and
    the better one is saved: repair can turn the order of two good candidates.

    Args:
        config: Of the run.
        base: Of the run.
        prepared: Of the base network.
        searched: By rate, the best that the search has measured within its budget.
        run_dir: Where the subnets are saved.
        build: Subnets -> networks, in their order.
        answers: Of `measure_policy`.
        reference: Of `measure_uniform`.
        out: Folder of the subnet of a single rate; by default `subnets/rate-R` in the run.

    Returns:
        What result.json says of each rate: `top1` of the saved subnet, `search_top1`,
        `policy_top1` and `uniform_top1` as candidates are scored, `policy_recovered_top1` and
        `search_recovered_top1` of both repaired as the saved one.

    Raises:
        EvaluationError: A rate has no candidate.
    """
    own: dict[float, EpisodeRecord] = {answer["rate"]: answer["record"] for answer in answers}
    candidates: dict[float, dict[Subnet, EpisodeRecord]] = {}
    for rate, best in searched.items():
        records = (record for record in (best, own.get(rate)) if record is not None)
        candidates[rate] = {record.subnet: record for record in records}
        if not candidates[rate]:
            raise EvaluationError(f"no candidate of rate {rate:.2f} was measured: see the journal")
    subnets = [subnet for found in candidates.values() for subnet in found]
    logger.info("repairing %d networks, and measuring them in float32", len(subnets))
    coming = iter(build(subnets))
    rows = []
    for rate, best in searched.items():
        built = {subnet: next(coming) for subnet in candidates[rate]}
        won = max(built, key=lambda each: (built[each].accuracy.top1, -built[each].accuracy.loss))
        winner, accuracy = candidates[rate][won], built[won].accuracy
        counts, is_sequential = winner.keep_counts, built[won].is_sequential
        folder = Path("subnets") / f"rate-{rate:.2f}" if out is None else out.absolute()
        row = {
            "rate": rate,
            "cost_kept": winner.cost_kept,
            "macs": winner.macs,
            "params": winner.params,
            "keep_counts": list(counts),
            "path": str(folder),
            "uniform_top1": (reference or {}).get(rate),
            "top1": accuracy.top1,
            "sequential": is_sequential,
            "finetuned_top1": None,
            "test_top1": None,
            "test_images": None,
        }
        description = {
            "model": config.model.name,
            "num_classes": len(base.search.classes),
            "classes": list(base.search.classes),
            "input_shape": list(base.plan.input_shape),
            "mean": list(base.search.mean),
            "std": list(base.search.std),
            "base_sha256": base.sha256,
            "cost": describe_cost(config.cost),
            "rate": rate,
            "cost_kept": winner.cost_kept,
            "macs": winner.macs,
            "params": winner.params,
            "criterion": winner.order or config.pruning.criterion,
            "recovery": config.pruning.recovery,
            "sequential": is_sequential,
            "keep_counts": list(counts),
            "groups": describe_kept(base.plan, prepared.with_order(winner.order).orders, counts),
            "search": dict(vars(accuracy)),
            "candidates": {
                "policy_top1": own[rate].top1 if rate in own else None,
                "search_top1": None if best is None else best.top1,
            },
        }
        save_subnet(run_dir / folder, built[won].net, description)
        row["search_top1"] = None if best is None else best.top1
        row["search_recovered_top1"] = None if best is None else built[best.subnet].accuracy.top1
        row["search_images"] = None if best is None else best.images
        if rate in own:
            row["policy_top1"] = own[rate].top1
            row["policy_recovered_top1"] = built[own[rate].subnet].accuracy.top1
        rows.append(row)
        logger.info("rate %.2f: %.2f %% on the search split, saved", rate, 100 * accuracy.top1)
    return rows


def add_latencies(result: dict[str, Any], base: Base, run_dir: Path) -> None:
    """Measures base and subnets side by side: one image, then a batch; one thread, float32."""
    models = {"base": base.model}
    models |= {
        row["path"]: load_subnet(run_dir / row["path"], finetuned=False) for row in result["rates"]
    }
    logger.info("measuring latency")
    images = base.search.take(LATENCY_BATCH).tensors()[0]
    for prefix, x, repeats in (("", images[:1], 100), ("batch_", images, 7)):
        found = measure_latency(models, x, threads=1, repeats=repeats, seconds=10.0)
        result["base"][f"{prefix}latency_ms"] = found["base"].median_ms
        for row in result["rates"]:
            row[f"{prefix}latency_ms"] = found[row["path"]].median_ms
            row[f"{prefix}speedup"] = speedup(found["base"], found[row["path"]])
    result["latency_batch"] = len(images)
    predict_latencies(result, base, models)


def predict_latencies(
    result: dict[str, Any], base: Base, models: Mapping[str, nn.Module], seconds: float = 10.0
) -> None:
    """Adds what a run's latency table says of each network, and a measurement made as the table.

    Args:
        result: Content of result.json; left alone where the run has no table.
        base: Of the run.
        models: `base`, and each rate's subnet by its path.
        seconds: For the measurement, which is left out where the table's device is not here.
    """
    table, cost_model = base.latency, base.plan.cost_model
    if table is None or cost_model.latency is None:
        return
    settings = table.settings
    result["latency_table"] = {
        **vars(settings), "processor": table.processor, "error": table.error
    }  # fmt: skip
    rows = {"base": (result["base"], cost_model.num_channels)}
    rows |= {row["path"]: (row, np.array(row["keep_counts"])) for row in result["rates"]}
    found: dict[str, Latency] = {}
    if settings.device != "cuda" or torch.cuda.is_available():
        x = torch.zeros(settings.batch, *base.plan.input_shape, device=settings.device)
        found = measure_latency(
            {name: copy.deepcopy(model).to(settings.device) for name, model in models.items()},
            x,
            threads=settings.threads,
            repeats=100,
            seconds=seconds,
            clock=settings.clock,
        )
    for name, (row, counts) in rows.items():
        row["predicted_latency_ms"] = int(cost_model.latency(counts)) / 1e6
        row["measured_latency_ms"] = found[name].median_ms if found else None
