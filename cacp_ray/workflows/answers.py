"""What a finished search answers: subnets for other rates, and recorded candidates scored again."""

import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cacp_ray.config.saved import check_new, is_run, read_run_config
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError
from cacp_ray.evaluation.classification import measure_accuracy
from cacp_ray.evaluation.measurement import (
    TOP1,
    Candidate,
    Evaluator,
    LocalEvaluator,
    Measurement,
    Metric,
    Scored,
    ScoreFunction,
)
from cacp_ray.evaluation.task_scorer import make_scorer
from cacp_ray.io.rates import format_rate
from cacp_ray.models.factory import import_beside
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.rundir.directory import RunDirectory, read_result
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.workflows.problem import Given, find_task
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits
from cacp_ray.workflows.strategy import CONDITIONAL, Policy, read_policy
from cacp_ray.workflows.winners import as_record, build_here, build_winners, measure_candidates

BEAM_WIDTH = 4  # best candidates so far, near which the next are sought

logger = logging.getLogger(__name__)


def answer_rates(
    run_dir: Path,
    rates: Sequence[float],
    evaluations: int,
    *,
    save: bool,
    out: Path | None = None,
    given: Given | None = None,
) -> list[dict[str, Any]]:
    """Subnets for any rates from the trained policy, without searching again.

    The policy's greedy answer and the best candidate around it are both built; the better one
    after the repair is saved.

    Args:
        run_dir: Folder of a search by a conditional agent.
        rates: Shares of the cost kept.
        evaluations: 0 takes the policy's greedy answer; N > 0 measures N candidates a rate, the
            greedy one and a beam around it, and takes the best on the search split.
        save: Whether to write a subnet folder a rate.
        out: Folder of the subnet of a single rate; by default `subnets/rate-R` in the run.
        given: Network and task of a search that was given them as objects.

    Raises:
        ArtifactError: The run has no policy, or a folder exists already.
        InfeasibleRateError: A rate cannot be reached.
    """
    config = read_run_config(run_dir)
    if config.strategy not in CONDITIONAL:
        raise ArtifactError(
            f"{run_dir} was searched by {config.strategy}, which has no policy for every rate: "
            f"search with strategy {' or '.join(CONDITIONAL)}"
        )
    resume = "continue the run with --resume, in Python resume=True"
    untrained = ArtifactError(f"{run_dir} has no trained policy yet: {resume}")
    checkpoint = RunDirectory(run_dir).find_checkpoint()
    if checkpoint is None and (latest := run_dir / "checkpoints" / "LATEST.json").exists():
        raise ArtifactError(f"{latest}: names no whole checkpoint; {resume}")
    if checkpoint is None:
        raise untrained
    for rate in rates if save else ():
        folder = out or run_dir / "subnets" / f"rate-{format_rate(rate)}"
        check_new(folder, "load it", "give another folder (--out)")
    logger.info("loading network, %s and agent", "images" if config.task is None else "task")
    setup = Setup.create(config, run_dir, given)
    for rate in rates:
        setup.budget.check(rate)
    setup = setup.prepare()
    told_in, num_told = checkpoint
    rows = RunDirectory(run_dir).read_records()[:num_told]
    policy = read_policy(setup, told_in, [row for row in rows if not row.is_answer])
    if policy is None:
        raise untrained
    evaluator = LocalEvaluator(_make_local_scorer(setup))
    best: dict[float, EpisodeRecord | None] = {}
    greedy: list[EpisodeRecord] = []
    answers: list[dict[str, Any]] = []
    for rate in rates:
        rng = np.random.default_rng([config.seed, round(1e4 * rate)])
        results = _measure_around_policy(policy, evaluator, rate, max(1, evaluations), rng)
        chosen, measurement = max(results, key=lambda result: result[1].rank)
        record = as_record(setup, chosen, measurement)
        best[rate] = record
        greedy.append(as_record(setup, *results[0]))
        answers.append(
            {
                "rate": rate,
                "cost_kept": record.cost_kept,
                "macs": record.macs,
                "params": record.params,
                "keep_counts": list(record.keep_counts),
                "policy_score": greedy[-1].score,
                "scored_score": record.score,
                "score": record.score,
            }
        )
    policy.stop()
    if save:
        winners = build_winners(setup, best, run_dir, build_here(setup), greedy, out=out)
        names = ("cost_kept", "macs", "params", "keep_counts", "score", "path")
        for answer, row in zip(answers, winners, strict=True):
            answer |= {name: row[name] for name in names}
    return answers


def _make_local_scorer(setup: Setup, images: int | None = None) -> ScoreFunction:
    config = setup.config
    return make_scorer(
        setup.prepared,
        setup.task,
        recovery=config.pruning.recovery,
        batch_size=config.evaluation.batch_size,
        dtype=config.evaluation.dtype,
        images=images,
    )


def _measure_around_policy(
    policy: Policy, evaluator: Evaluator, rate: float, evaluations: int, rng: np.random.Generator
) -> list[tuple[Candidate, Measurement]]:
    """The greedy answer, then in three rounds what lies around it and around the best so far."""
    results: list[tuple[Candidate, Measurement]] = []
    stops = sorted({1, *(math.ceil(evaluations * share) for share in (0.5, 0.75, 1))})
    for stop in stops:
        best = sorted(results, key=lambda result: -result[1].score)[:BEAM_WIDTH]
        drawn = policy.policy_samples(
            rate,
            stop - len(results),
            rng,
            beam=[candidate.keep_counts for candidate, _ in best],
            known={candidate.keep_counts for candidate, _ in results},
        )
        candidates = [Candidate(rate, counts) for counts in drawn]
        for candidate, measurement in zip(
            candidates, measure_candidates(evaluator, candidates), strict=True
        ):
            if measurement is None:
                raise EvaluationError(
                    f"rate {format_rate(rate)}: a candidate cannot be scored, as said above"
                )
            results.append((candidate, measurement))
    return results


def rescore_candidate(run_dir: Path, index: int) -> tuple[EpisodeRecord, Measurement, Metric]:
    """Rebuilds a recorded candidate and scores it again as the evaluators do.

    Raises:
        ArtifactError: The run has no candidate of that index.
    """
    records = {record.index: record for record in RunDirectory(run_dir).read_records()}
    if index not in records:
        raise ArtifactError(f"{run_dir} has no candidate {index}: it recorded {len(records)}")
    setup = Setup.open(run_dir)
    score = _make_local_scorer(setup, setup.config.evaluation.images)
    measurement = score(records[index].candidate)
    if measurement.status != "ok":
        raise EvaluationError(f"candidate {index}: {measurement.error}")
    return records[index], measurement, setup.task.metric


def evaluate_subnets(path: Path, split: str) -> Iterator[tuple[Path, float, Scored, Metric]]:
    """Measures a subnet folder, or all of a run, as a user would load them, in float32.

    A task of the user's own scores them in its one way, whatever the split.

    Yields:
        Folder, rate, what it is worth on the split of the run, and what that measures.

    Raises:
        ArtifactError: There is no run, or a subnet is unreadable.
        ConfigError: A subnet stands outside its run, or has other classes than the data.
    """
    is_subnet = (path / "subnet.json").exists()
    run = path.absolute().parent.parent if is_subnet else path
    if is_subnet and not is_run(run):
        raise ConfigError(f"{path} stands outside its run, whose config.yaml names the data")
    config = read_run_config(run)
    import_beside(config.model.name)
    folders = [path] if is_subnet else [run / row["path"] for row in read_result(run)["rates"]]
    if (task := find_task(config, None)) is not None:
        for folder in folders:
            net = load_subnet(folder, trust=True)
            yield folder, read_description(folder, "rate")["rate"], task.measure(net), task.metric
        return
    for folder in folders:
        description = read_description(folder, "classes", "rate")
        data = Splits(config.data).open(split)
        if data.classes != tuple(description["classes"]):
            raise ConfigError(
                f"{folder} has the classes {', '.join(description['classes'][:3])} ..., "
                f"data.{split} others: give the configuration it was searched with"
            )
        scored = measure_accuracy(load_subnet(folder, trust=True), data)
        yield folder, description["rate"], scored, TOP1
