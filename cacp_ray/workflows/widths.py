"""A run whose strategy learns the widths while the network trains, instead of a search before it.

The run directory is that of a search: a subnet for every rate, with the weights that the training
left, one measurement each, result.json. Fine-tuning, report and comparison go on from there.
"""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cacp_ray.config.run import RunConfig
from cacp_ray.config.saved import is_run
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.building import Built
from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.evaluation.preparation import BN_BATCH
from cacp_ray.io.clock import Clock
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.calibration import inputs_in_parts
from cacp_ray.pruning.recovery import recalibrate_bn
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.subnet import save_subnet
from cacp_ray.pruning.surgery import Cutter, reorder_weights
from cacp_ray.reporting.progress import FinetuneProgress
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.searching.widths.table import FOR_ALL_RATES
from cacp_ray.workflows.problem import Given
from cacp_ray.workflows.result import finish_run
from cacp_ray.workflows.setup import Setup, describe_accuracy
from cacp_ray.workflows.splits import Splits, check_splits
from cacp_ray.workflows.start import begin_run, prepare_run, write_model
from cacp_ray.workflows.storage import RESULT_FILE, make_push, training_into
from cacp_ray.workflows.width_problem import make_problem, read_recipe
from cacp_ray.workflows.winners import as_record, describe_subnet

if TYPE_CHECKING:
    from cacp_ray.tuning.widths import Learned

logger = logging.getLogger(__name__)

TRIALS_FOLDER = "widths"  # of a run: Ray Tune's own files


def learn_run(
    config: RunConfig,
    run_dir: Path,
    given: Given | None,
    *,
    address: str | None,
    mirror: RunMirror | None,
) -> dict[str, Any]:
    """Fills `run_dir` up to result.json, whose content it returns; a run that has begun goes on."""
    clock, run = Clock(), RunDirectory(run_dir)
    is_begun = is_run(run_dir)
    if mirror is not None and mirror.holds(RESULT_FILE):  # the folder has none: see `search`
        raise ArtifactError(
            f"{mirror.uri} holds the result of a run that {run_dir} lacks: remove the folder or "
            "choose another --run-dir, and it is fetched from there"
        )
    with ExitStack() as lock:
        if is_begun:
            lock.enter_context(run.locked())
        setup, statistics = prepare_run(config, run_dir, address, clock, given)
        if not is_begun:
            lock.enter_context(run.locked())
            if is_run(run_dir):
                raise ArtifactError(
                    f"{run_dir}: another process has begun a run there: pass --resume (in Python "
                    "resume=True) to continue it, or choose another --run-dir"
                )
        with clock.phase("start"):
            if setup.saved is None:
                begin_run(run, setup, statistics)
            saved = setup.saved or write_model(run, setup)
            logger.info(describe_accuracy(saved))
        with training_into(mirror, run_dir):
            with clock.phase("search"):
                learned = _learn(setup, run_dir, mirror)
            with clock.phase("build"):
                rows = [_build(setup, run, index, each) for index, each in enumerate(learned)]
                run.compact()
            clock.seconds["search"] = round(sum(each.seconds for each in _distinct(learned)), 2)
            return finish_run(
                setup,
                run_dir,
                saved["base"],
                rows,
                evaluations=len(rows),
                seconds=clock.seconds,
                mirror=None,  # `training_into` copies it
            )


def _learn(setup: Setup, run_dir: Path, mirror: RunMirror | None) -> list["Learned"]:
    """Trains on Ray Tune; one entry a rate, rising."""
    from cacp_ray.distributed.probe import probe_nodes
    from cacp_ray.tuning.experiment import TrialFiles
    from cacp_ray.tuning.widths import WidthTask, run_width_trials

    config, splits = setup.config, Splits(setup.config.data)
    train = splits.open("train")
    check_splits({"train": train, "search": setup.search})
    cluster = config.cluster
    task = WidthTask(
        strategy=config.strategy,
        model=setup.model,
        problem=make_problem(setup, setup.prepared.orders),
        recipe=read_recipe(config),
        cpus=cluster.cpus_per_evaluator,
        gpus=float(cluster.gpus_per_evaluator),
        labels=cluster.label_selector,
    )
    shared = run_dir.resolve() if mirror is None else mirror.folder
    streams = [train] if isinstance(train, ImageStream) else []
    probe_nodes([] if shared is None else [shared], streams)
    if mirror is not None:
        mirror.finish(run_dir)  # before the trials, so that no other run begins there
    folder = str((run_dir / TRIALS_FOLDER).resolve())
    files = TrialFiles(folder) if mirror is None else TrialFiles(*mirror.trials(TRIALS_FOLDER))
    push = make_push(mirror, run_dir)
    is_for_all = config.strategy in FOR_ALL_RATES

    def note(progress: FinetuneProgress) -> None:
        push()
        logger.info(
            "%s %s  epoch %d/%d  loss %.3f  search split %.2f %% %s",
            config.strategy,
            "all rates" if is_for_all else format_rate(progress.rate),
            progress.epoch,
            progress.epochs,
            progress.train_loss,
            100 * progress.search_score,
            "whole" if is_for_all else "behind its gates",
        )

    return run_width_trials(task, (train, setup.search), files, note)


def _build(setup: Setup, run: RunDirectory, index: int, learned: "Learned") -> dict[str, Any]:
    """Cuts, measures and saves the subnet of a rate; returns its row of result.json.

    BN statistics are estimated anew: those of the training knew the channels that are gone.
    """
    widths, config, plan = learned.widths, setup.config, setup.plan
    ordered = reorder_weights(plan, learned.tensors, widths.orders)
    keep_counts = widths.keep_counts.tolist()
    net = build_subnet(setup.model, ordered | Cutter(plan)(ordered, keep_counts))
    recalibrate_bn(net, inputs_in_parts(setup.calibration, BN_BATCH))
    scored = setup.task.measure(net)
    candidate = Candidate(widths.rate, tuple(keep_counts), index=index)
    measurement = Measurement(**vars(scored), index=index, seconds=learned.seconds, status="ok")
    record = as_record(setup, candidate, measurement)
    if index not in {row.index for row in run.read_records()}:
        run.append(record)
    folder = Path("subnets") / f"rate-{format_rate(widths.rate)}"
    facts = {
        "rate": widths.rate,
        "cost_kept": record.cost_kept,
        "macs": record.macs,
        "params": record.params,
        "keep_counts": keep_counts,
        "sequential": False,
    }
    built = Built(net, scored, is_sequential=False)
    description = describe_subnet(setup, facts, widths.orders, config.strategy, built)
    save_subnet(run.path / folder, net, description | {"recovery": "bn"})
    shown = setup.task.metric.describe(scored.score)
    logger.info("rate %s: %s, saved", format_rate(widths.rate), shown)
    return {
        **facts,
        "learned": True,
        "search_score": scored.score,
        "search_images": scored.images,
        "path": str(folder),
        "score": scored.score,
        "uniform_score": None,
        "finetuned_score": None,
        "test_score": None,
        "test_images": None,
    }


def _distinct(learned: Sequence["Learned"]) -> list["Learned"]:
    """One of each training."""
    return list({id(each.tensors): each for each in learned}.values())
