"""What a finished search is good for: fine-tuning, other rates, re-scoring, the report."""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cacp_ray.config import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError
from cacp_ray.evaluation.measurement import (
    Candidate,
    Evaluator,
    LocalEvaluator,
    Measurement,
)
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.files import read_object
from cacp_ray.loading import (
    check_weights,
    find_statistics,
    load_base,
    open_split,
    prepare_base,
    read_orders,
)
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.reporting.html import write_report
from cacp_ray.searching.records import EpisodeRecord
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.strategies import CONDITIONAL, make_run_strategy
from cacp_ray.training.metrics import Accuracy, measure_split
from cacp_ray.winners import as_record, build_here, build_winners, measure_candidates

BEAM_WIDTH = 4  # best candidates so far, near which the next are sought

logger = logging.getLogger(__name__)


def read_result(run_dir: Path) -> dict[str, Any]:
    """The content of result.json.

    Raises:
        ArtifactError: The search has not ended yet.
    """
    if not (run_dir / "result.json").exists():
        raise ArtifactError(
            f"{run_dir} has no result.json: finish the search with `cacp-ray search --resume`"
        )
    return read_object(run_dir / "result.json", ("rates",))


def report_run(run_dir: Path) -> Path:
    """Writes report.html and the figures of a finished search."""
    read_result(run_dir)
    records = RunDirectory(run_dir).read_records()
    table = pa.Table.from_pylist([dataclasses.asdict(record) for record in records])
    return write_report(run_dir, table)


def parse_rates(text: str) -> list[float]:
    """`0.42`, or `LO:HI:STEP` with both ends.

    Raises:
        ConfigError: Not of that form, or outside (0, 1].
    """
    try:
        numbers = [float(part) for part in text.split(":")]
        if len(numbers) == 3:
            low, high, step = numbers
            count = int((high - low) / step + 1e-9) + 1
            numbers = [round(low + step * i, 4) for i in range(count)]
        elif len(numbers) != 1:
            raise ValueError(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"--rate {text}: write one rate such as 0.42, or 0.2:0.9:0.02") from error
    if not numbers:
        raise ConfigError(f"--rate {text}: write the smaller rate first")
    if not all(0 < number <= 1 and number == round(number, 2) for number in numbers):
        raise ConfigError(
            f"--rate {text}: a rate is the share of the cost kept, in (0, 1], with two decimals"
        )
    return numbers


def answer_rates(
    config: RunConfig,
    run_dir: Path,
    rates: Sequence[float],
    evaluations: int,
    *,
    save: bool,
    out: Path | None = None,
) -> list[dict[str, Any]]:
    """Subnets for any rates from the trained policy, without searching again.

    Of the policy's greedy answer and the best candidate around it, that is saved which is better
    after the repair.

    Args:
        config: Of the run.
        run_dir: Of a search by the `cacp` strategy.
        rates: Share of the cost kept.
        evaluations: 0 takes the policy's greedy answer; otherwise so many candidates a rate, the
            greedy one and a beam around it, and the best on the search split.
        save: Whether to write a subnet folder a rate.
        out: That folder, of a single rate; by default `subnets/rate-R` in the run.

    Raises:
        ArtifactError: No policy in the run, or a folder exists already.
        InfeasibleRateError: A rate cannot be reached.
    """
    run = RunDirectory(run_dir)
    checkpoint = run.find_checkpoint()
    if config.strategy not in CONDITIONAL:
        raise ArtifactError(
            f"{run_dir} was searched by {config.strategy}, which has no policy for every rate: "
            f"search with strategy {' or '.join(CONDITIONAL)}"
        )
    if checkpoint is None:
        raise ArtifactError(f"{run_dir} has no trained policy yet: continue it with --resume")
    for rate in rates if save else ():
        folder = out or run_dir / "subnets" / f"rate-{rate:.2f}"
        if folder.exists():
            raise ArtifactError(f"{folder} exists: load it, or give another folder (--out)")
    logger.info("loading network, images and agent")
    base = load_base(config)
    check_weights(base, run_dir)
    for rate in rates:
        base.budget.check(rate)
    orders = read_orders(read_object(run_dir / "model.json", ("groups",)))
    prepared = prepare_base(base, config, orders, find_statistics(base, config, run_dir))
    strategy, agent = make_run_strategy(config, base)
    strategy.restore(checkpoint[0] / "strategy")
    if not agent.is_attached:
        raise ArtifactError(f"{run_dir} has no trained policy yet: continue it with --resume")
    evaluator = LocalEvaluator(
        make_scorer(
            prepared,
            base.search,
            recovery=config.pruning.recovery,
            batch_size=config.evaluation.batch_size,
            dtype=config.evaluation.dtype,
        )
    )
    best: dict[float, EpisodeRecord | None] = {}
    answers, own = [], []
    for rate in rates:
        rng = np.random.default_rng([config.seed, round(1e4 * rate)])
        found = _measure_around_policy(agent, evaluator, rate, max(1, evaluations), rng)
        chosen, measured = max(found, key=lambda result: (result[1].top1, -result[1].loss))
        record = as_record(base, config, chosen, measured)
        answers.append(
            {
                "rate": rate,
                "cost_kept": record.cost_kept,
                "macs": record.macs,
                "params": record.params,
                "keep_counts": list(record.keep_counts),
                "policy_top1": found[0][1].top1,
                "scored_top1": measured.top1,
                "top1": measured.top1,
            }
        )
        best[rate] = record
        own.append({"rate": rate, "record": as_record(base, config, *found[0])})
    agent.stop()
    if save:
        build = build_here(config, prepared, base.search)
        winners = build_winners(config, base, prepared, best, run_dir, build, own, out=out)
        names = ("cost_kept", "macs", "params", "keep_counts", "top1", "path")
        for answer, row in zip(answers, winners, strict=True):
            answer |= {name: row[name] for name in names}
    return answers


def _measure_around_policy(
    agent: Any, evaluator: Evaluator, rate: float, evaluations: int, rng: np.random.Generator
) -> list[tuple[Candidate, Measurement]]:
    """The greedy answer, then in three rounds what lies around it and around the best so far."""
    results: list[tuple[Candidate, Measurement]] = []
    stops = sorted({1, *(math.ceil(evaluations * share) for share in (0.5, 0.75, 1))})
    for stop in stops:
        best = sorted(results, key=lambda result: -result[1].top1)[:BEAM_WIDTH]
        known = {candidate.keep_counts for candidate, _ in results}
        drawn = agent.policy_samples(
            rate,
            stop - len(results),
            rng,
            beam=[candidate.keep_counts for candidate, _ in best],
            known=known,
        )
        candidates = [Candidate(len(results) + i, rate, row) for i, row in enumerate(drawn)]
        found = measure_candidates(evaluator, candidates)
        if len(found) < len(candidates):
            raise EvaluationError(f"rate {rate:.2f}: a candidate cannot be scored, as said above")
        results += [(candidate, found[candidate.index]) for candidate in candidates]
    return results


def rescore_candidate(
    config: RunConfig, run_dir: Path, index: int
) -> tuple[EpisodeRecord, Accuracy]:
    """Rebuilds a recorded candidate and scores it again as the evaluators do.

    Raises:
        ArtifactError: No such index in the run.
    """
    records = {record.index: record for record in RunDirectory(run_dir).read_records()}
    if index not in records:
        raise ArtifactError(f"{run_dir} has no candidate {index}: it recorded {len(records)}")
    record = records[index]
    base = load_base(config)
    check_weights(base, run_dir)
    orders = read_orders(read_object(run_dir / "model.json", ("groups",)))
    score = make_scorer(
        prepare_base(base, config, orders, find_statistics(base, config, run_dir)),
        base.search,
        recovery=config.pruning.recovery,
        batch_size=config.evaluation.batch_size,
        dtype=config.evaluation.dtype,
        images=config.evaluation.images,
    )
    found = score(Candidate(index, record.rate, record.keep_counts, order=record.order))
    if found.status != "ok":
        raise EvaluationError(f"candidate {index}: {found.error}")
    return record, Accuracy(found.top1, found.top5, found.loss, found.images)


def evaluate_subnet(folder: Path, config: RunConfig, split: str) -> tuple[dict[str, Any], Accuracy]:
    """Loads a subnet folder as a user would and measures it in float32 on a split of the run."""
    description = read_description(folder)
    data = open_split(config.data, split)
    if data.classes != tuple(description["classes"]):
        raise ConfigError(
            f"{folder} has the classes {', '.join(description['classes'][:3])} ..., "
            f"data.{split} others: give the configuration it was searched with"
        )
    return description, measure_split(load_subnet(folder), data)
