"""What a search leaves: the policy's answers, and the winner of every rate, built and measured."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.building import Builder, Built
from cacp_ray.evaluation.measurement import Candidate, Evaluator, Measurement, SubnetKey
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.arguments import describe_inputs
from cacp_ray.pruning.cost import describe_cost
from cacp_ray.pruning.subnet import describe_kept, save_subnet
from cacp_ray.pruning.surgery import Orders
from cacp_ray.rundir.records import EpisodeRecord, make_record
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.strategy import make_candidates
from cacp_ray.workflows.setup import Setup

logger = logging.getLogger(__name__)

Build = Callable[[Sequence[SubnetKey]], Iterable[Built]]

FRONTIER = tuple(round(0.2 + 0.05 * step, 2) for step in range(15))


def measure_candidates(
    evaluator: Evaluator, candidates: Sequence[Candidate]
) -> list[Measurement | None]:
    """Scores candidates outside a search; in their order, None for one that failed."""
    for index, candidate in enumerate(candidates):
        evaluator.submit(replace(candidate, index=index))
    measurements: dict[int, Measurement] = {}
    while len(measurements) < len(candidates):
        measurements |= {new.index: new for new in evaluator.results(10.0)}
    for index, measurement in measurements.items():
        _warn_of_failure(candidates[index].rate, measurement)
    in_order = [measurements[index] for index in range(len(candidates))]
    return [each if each.status == "ok" else None for each in in_order]


def frontier_rates(setup: Setup) -> list[float]:
    """Reachable rates from 0.2 to 0.9, without the run's own, at which the policy is asked."""
    budget, asked = setup.budget, setup.config.rates
    return [r for r in FRONTIER if r not in asked and budget.limit(r) >= budget.smallest]


def measure_outside(
    setup: Setup, rates: Sequence[float], keep_counts: ArrayLike, evaluator: Evaluator
) -> list[EpisodeRecord]:
    """Measures an allocation a rate outside the search; those that failed are left out.

    They are no evaluations, and nothing is chosen by them.
    """
    candidates = [
        replace(candidate, images=len(setup.task))
        for candidate in make_candidates(rates, keep_counts)
    ]
    measurements = measure_candidates(evaluator, candidates)
    return [
        as_record(setup, candidate, measurement)
        for candidate, measurement in zip(candidates, measurements, strict=True)
        if measurement is not None
    ]


def measure_uniform(setup: Setup, evaluator: Evaluator) -> dict[float, float]:
    """Top-1 of the same keep ratio in all groups, by rate: the reference of a report."""
    rates = setup.config.rates
    rows = uniform(setup.budget, rates, np.ones(len(setup.budget.num_channels)))
    answers = measure_outside(setup, rates, rows, evaluator)
    return {answer.rate: answer.score for answer in answers}


def drop_failed(records: Iterable[EpisodeRecord]) -> list[EpisodeRecord]:
    """Records without those whose measurement failed, which are logged."""
    kept: list[EpisodeRecord] = []
    for record in records:
        _warn_of_failure(record.rate, record)
        if record.status == "ok":
            kept.append(record)
    return kept


def _warn_of_failure(rate: float, measurement: Measurement) -> None:
    if measurement.status != "ok":
        what = format_rate(rate)
        logger.warning("a final measurement at rate %s failed: %s", what, measurement.error)


def as_record(setup: Setup, candidate: Candidate, measurement: Measurement) -> EpisodeRecord:
    """A measurement outside the search, as the search records its own."""
    cost_model, config = setup.plan.cost_model, setup.config
    return make_record(
        candidate, measurement, cost_model, cost=config.cost, strategy=config.strategy
    )


def builder_settings(setup: Setup) -> dict[str, Any]:
    """Keyword arguments of `Builder`."""
    pruning = setup.config.pruning
    return {
        "recovery": pruning.recovery,
        "sequential": pruning.sequential,
        "seed": setup.config.seed,
    }


def build_here(setup: Setup) -> Build:
    """Builds one network after another in this process."""
    return partial(map, Builder(setup.prepared, setup.task, **builder_settings(setup)))


def choose_build(setup: Setup, gpus: float) -> Build:
    """Final subnets are built where evaluators ran, unless this machine is all there is."""
    from cacp_ray.distributed.building import build_on_nodes, is_alone

    if is_alone() and not gpus:
        return build_here(setup)
    return partial(
        build_on_nodes,
        **setup.stored,
        settings=builder_settings(setup),
        cpus=setup.config.cluster.cpus_per_evaluator,
        gpus=gpus,
    )


def build_winners(
    setup: Setup,
    searched: Mapping[float, EpisodeRecord | None],
    run_dir: Path,
    build: Build,
    answers: Sequence[EpisodeRecord] = (),
    reference: Mapping[float, float] | None = None,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Builds, measures in float32 on the search split, and saves the best subnet of every rate.

    Where a policy has answered a rate, its subnet and that of the search's best are both built, and
    the better one is saved: repair can turn the order of two good candidates.

    Args:
        setup: A prepared problem.
        searched: By rate, the best that the search has measured within its budget.
        run_dir: Where the subnets are saved.
        build: Subnets -> networks, in their order.
        answers: The policy's answers, at these rates and others.
        reference: Top-1 by rate of `measure_uniform`.
        out: Folder of the subnet of a single rate; by default `subnets/rate-R` in the run.

    Returns:
        What result.json says of each rate: `score` of the saved subnet, `search_score`,
        `policy_score` and `uniform_score` as candidates are scored, `policy_recovered_score` and
        `search_recovered_score` of both repaired as the saved one.

    Raises:
        EvaluationError: A rate has no candidate.
    """
    own = {answer.rate: answer for answer in answers if answer.rate in searched}
    contenders: dict[float, dict[SubnetKey, EpisodeRecord]] = {}
    for rate, best in searched.items():
        records = [record for record in (best, own.get(rate)) if record is not None]
        if not records:
            raise EvaluationError(
                f"no candidate of rate {format_rate(rate)} was measured: see the journal"
            )
        contenders[rate] = {record.key: record for record in records}
    keys = [key for records in contenders.values() for key in records]
    several = ("networks", "them") if len(keys) > 1 else ("network", "it")
    logger.info("repairing %d %s, and measuring %s in float32", len(keys), *several)
    networks = iter(build(keys))
    rows: list[dict[str, Any]] = []
    for rate, best in searched.items():
        built = {key: next(networks) for key in contenders[rate]}
        won = max(built, key=lambda key: built[key].scored.rank)
        folder = Path("subnets") / f"rate-{format_rate(rate)}" if out is None else out.absolute()
        facts = {"rate": rate} | _describe(contenders[rate][won], built[won])
        scores = _compare(best, own.get(rate), built)
        _save(setup, run_dir / folder, contenders[rate][won], built[won], facts, scores)
        rows.append(
            {
                **facts,
                **scores,
                "path": str(folder),
                "score": built[won].scored.score,
                "uniform_score": (reference or {}).get(rate),
                "finetuned_score": None,
                "test_score": None,
                "test_images": None,
            }
        )
        logger.info(
            "rate %s: %s, saved",
            format_rate(rate),
            setup.task.metric.describe(built[won].scored.score),
        )
    return rows


def _describe(winner: EpisodeRecord, built: Built) -> dict[str, Any]:
    """What both result.json and subnet.json say of a winner, but for its rate."""
    return {
        "cost_kept": winner.cost_kept,
        "macs": winner.macs,
        "params": winner.params,
        "keep_counts": list(winner.keep_counts),
        "sequential": built.is_sequential,
    }


def _compare(
    best: EpisodeRecord | None, answer: EpisodeRecord | None, built: Mapping[SubnetKey, Built]
) -> dict[str, Any]:
    """Figures of the search's best and, where there is one, of the policy's answer."""
    scores: dict[str, Any] = {
        "search_score": None if best is None else best.score,
        "search_recovered_score": None if best is None else built[best.key].scored.score,
        "search_images": None if best is None else best.images,
    }
    if answer is not None:
        scores["policy_score"] = answer.score
        scores["policy_recovered_score"] = built[answer.key].scored.score
    return scores


def _save(
    setup: Setup,
    folder: Path,
    winner: EpisodeRecord,
    built: Built,
    facts: Mapping[str, Any],
    scores: Mapping[str, Any],
) -> None:
    orders = setup.prepared.with_order(winner.criterion).orders
    criterion = winner.criterion or setup.config.pruning.criterion
    description = {
        **describe_subnet(setup, facts, orders, criterion, built),
        "candidates": {name: scores.get(name) for name in ("policy_score", "search_score")},
    }
    save_subnet(folder, built.net, description)


def describe_subnet(
    setup: Setup, facts: Mapping[str, Any], orders: Orders, criterion: str, built: Built
) -> dict[str, Any]:
    """The content of subnet.json.

    Args:
        setup: The problem of the run.
        facts: `rate`, `cost_kept`, `keep_counts` and what else belongs to this subnet.
        orders: Channels of the base network by group, those that are kept first.
        criterion: What ranked them.
        built: The network.
    """
    config = setup.config
    return {
        "model": config.model.name,
        **({"kwargs": dict(config.model.kwargs)} if config.model.kwargs else {}),
        "input_shape": list(setup.plan.input_shape),
        **describe_inputs(setup.inputs),
        **setup.task.describe(),
        "base_sha256": setup.sha256,
        "cost": describe_cost(config.cost),
        **facts,
        "criterion": criterion,
        "recovery": config.pruning.recovery,
        "uncounted": setup.plan.uncounted,
        "groups": describe_kept(setup.plan, orders, facts["keep_counts"]),
        "search": built.scored.describe(),
    }
