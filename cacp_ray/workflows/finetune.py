"""Fine-tuning of what a search found, or of one subnet folder: which subnets, by which recipes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from cacp_ray.config.finetune import FinetuneConfig
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig, ModelConfig, RunConfig
from cacp_ray.config.saved import is_run, read_run_config
from cacp_ray.data.images import ImageSet
from cacp_ray.data.streams import ImageStream
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.classification import measure_accuracy
from cacp_ray.io.clock import Clock
from cacp_ray.io.files import read_json, write_json
from cacp_ray.io.rates import format_rate
from cacp_ray.pruning.subnet import build_network, read_description, read_subnet
from cacp_ray.reporting.artifacts import log_networks
from cacp_ray.reporting.progress import FinetuneProgress
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.rundir.schema import ReportedFile
from cacp_ray.workflows.finetune_own import finetune_by_task
from cacp_ray.workflows.ladder import check_order, list_experiments, note_trained
from cacp_ray.workflows.network import check_weights, load_model, make_rebuild
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits, check_padding, check_splits
from cacp_ray.workflows.storage import make_push, open_for_training, training_into
from cacp_ray.workflows.trained import trained_frontier

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """The subnets of one fine-tuning, and the network, data and CPUs that serve them.

    Attributes:
        folders: Subnet folders by rate.
        model: The base network: the teacher.
        data: Splits to learn from, to choose by, and to test on.
        experiment_dir: Folder of Tune's own files.
        cpus: CPUs of a trial or worker.
        run: Configuration of the run; None for one subnet.
    """

    folders: dict[float, Path]
    model: ModelConfig
    data: DataConfig
    experiment_dir: Path
    cpus: int
    run: RunConfig | None = None


def finetune(
    folder: str | Path,
    *,
    resume: bool = False,
    address: str | None = None,
    storage: str | Path | RunMirror | None = None,
    config: FinetuneConfig | dict[str, Any] | str | Path | None = None,
    overrides: Sequence[str] = (),
    on_epoch: Callable[[FinetuneProgress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Fine-tunes the subnets of a finished search, all rates side by side, or one subnet.

    Args:
        folder: A run directory, or a subnet folder.
        resume: Whether to go on with an interrupted fine-tuning.
        address: Address of a Ray cluster.
        storage: Folder, s3:// or gs:// URI with a copy of the run, which is fetched where `folder`
            does not hold it. Trials write there, so nodes need no common folder, and results are
            copied there.
        config: A configuration, its content, or the path of its YAML file. A `finetune` section in
            it replaces the one that the run was searched with.
        overrides: `key.path=value` on top of both.
        on_epoch: Called with every finished epoch.

    Returns:
        The content of the run's result.json, or of the subnet's metrics.json.

    Raises:
        CacpError: Bad input, or a trial that failed too often.
    """
    where = Path(folder)
    is_subnet = (where / "subnet.json").exists()
    if is_subnet and storage is not None:
        raise ConfigError(f"{where} is one subnet: with --storage, give its run")
    mirror = None if storage is None else open_for_training(storage, where)
    run_dir = where.resolve().parent.parent if is_subnet else where
    searched = None if is_subnet and not is_run(run_dir) else read_run_config(run_dir)
    source = config.model_dump(exclude_unset=True) if isinstance(config, FinetuneConfig) else config
    sections = {"finetune", "model", "data"}
    settings = load_config(
        FinetuneConfig,
        {} if source is None else source,
        overrides,
        defaults=None if searched is None else searched.model_dump(include=sections),
    )
    if searched is not None and searched.task is not None:
        order = settings.finetune.order
        asked = searched.finetune if is_subnet else replace(searched.finetune, order=order)
        if is_subnet or settings != FinetuneConfig(
            finetune=asked, model=searched.model, data=searched.data
        ):
            raise ConfigError(
                f"{where}: a task of your own is trained by its train(net, context), for a whole "
                "run; of our settings only finetune.order counts: give the run alone"
            )
        return finetune_by_task(
            where,
            order=order,
            resume=resume,
            address=address,
            mirror=mirror,
            on_report=_log_report,
        )
    if is_subnet:
        _finetune(_make_subnet_job(where, settings), settings, resume, address, None, on_epoch)
        return read_json(where / "metrics.json")
    assert searched is not None
    with training_into(mirror, where):
        return _finetune_run(searched, where, settings, resume, address, mirror, on_epoch)


def _log_report(report: dict[str, Any]) -> None:
    logger.info(
        "rate %s  report %d  score %.5g",
        format_rate(report["rate"]),
        report["epoch"],
        report["search_score"],
    )


def _finetune_run(
    config: RunConfig,
    run_dir: Path,
    settings: FinetuneConfig,
    resume: bool,
    address: str | None,
    mirror: RunMirror | None,
    on_epoch: Callable[[FinetuneProgress], None],
) -> dict[str, Any]:
    """Fine-tunes the subnet of every rate and completes result.json, whose content it returns."""
    clock = Clock()
    if (settings.model, settings.data) != (config.model, config.data):
        raise ConfigError(
            f"{run_dir} was searched with another `model` or `data`: leave both out of --config "
            "and --set"
        )
    result = read_result(run_dir, ReportedFile)
    check_weights(config, run_dir)
    job = Job(
        {row["rate"]: run_dir / row["path"] for row in result["rates"]},
        config.model,
        config.data,
        run_dir / "finetune",
        settings.trials.cpus or config.cluster.cpus_per_evaluator,
        config,
    )
    trained: list[FinetuneProgress] = []
    push = make_push(mirror, run_dir)

    def note(progress: FinetuneProgress) -> None:
        if not progress.is_restored:
            trained.append(progress)
        push()
        on_epoch(progress)

    with clock.phase("finetune"):
        tuned, test = _finetune(job, settings, resume, address, mirror, note)
        if result["base"].get("test") is None:
            base = load_model(config.model, len(test.classes))
            result["base"]["test"] = measure_accuracy(base, test).describe()
    for row in result["rates"]:
        note_trained(row, run_dir)
        row["finetuned_score"] = tuned[row["rate"]].search_score
        row["test_score"] = tuned[row["rate"]].test_score
        row["test_images"] = tuned[row["rate"]].test_images
    if trained or "finetune" not in result["seconds"]:  # else it had been finished before
        result["seconds"] |= clock.seconds
    write_json(run_dir / "result.json", result)
    if config.report.frontier and (trained or "trained_frontier" not in result):
        logger.info("cutting networks of other rates from the trained ones")
        with clock.phase("cuts"):
            result["trained_frontier"] = trained_frontier(run_dir)
        result["seconds"] |= {"cuts": clock.seconds["cuts"]}
        write_json(run_dir / "result.json", result)
    if trained:
        log_networks(settings.trials.logging, run_dir.name, run_dir, result)
    return result


def _make_subnet_job(folder: Path, settings: FinetuneConfig) -> Job:
    """One subnet folder, wherever it lies; Tune's files go into its `finetune`."""
    description = read_description(folder, "rate")
    if settings.data is None:
        raise ConfigError(f"{folder} lies in no run: give its data by --config, in `data`")
    if settings.finetune.teacher == "larger":
        raise ConfigError(
            f"finetune.teacher larger: {folder} alone has no larger subnet: fine-tune its run, or "
            "set finetune.teacher=base"
        )
    distils = any(recipe.distillation > 0 for recipe in settings.recipes.values())
    if distils and (settings.model is None or settings.model.weights is None):
        raise ConfigError(
            f"{folder} lies in no run: name the base network and its weights by --config, in "
            "`model`, or set finetune.distillation to 0"
        )
    data = _as_searched(settings.data, description)
    first = Splits(data).read("search", 1)
    classes = list(first.classes)
    if classes != description.get("classes", classes):
        raise ConfigError(
            f"{folder} was searched on other classes than data.search has: give the data of its run"
        )
    height, width, channels = first.images.shape[1:]
    shape = [channels, height, width]
    if (searched := description.get("input_shape") or shape) != shape:
        raise ConfigError(
            f"{folder} was searched on images of {searched} (channels, height, width), "
            f"data.search has {shape}: set data.mean, data.std, data.resize and data.crop as in "
            "its run"
        )
    model = settings.model or ModelConfig(name=description["model"])
    cpus = settings.trials.cpus or 1
    return Job({description["rate"]: folder}, model, data, folder / "finetune", cpus)


def _as_searched(data: DataConfig, description: Mapping[str, Any]) -> DataConfig:
    """The data with the normalisation of the search, unless the file sets its own."""
    own = {
        name: tuple(description[name])
        for name in ("mean", "std")
        if name in description and name not in data.model_fields_set
    }
    return data.model_copy(update=own)


def _finetune(
    job: Job,
    settings: FinetuneConfig,
    resume: bool,
    address: str | None,
    mirror: RunMirror | None,
    on_epoch: Callable[[FinetuneProgress], None],
) -> tuple[Mapping[float, Any], ImageSet | ImageStream]:
    """Trains on Ray Tune; returns the results by rate, and the test split."""
    from cacp_ray.distributed.cluster import check_address, check_room, connect
    from cacp_ray.distributed.nodes import check_labels, read_nodes
    from cacp_ray.distributed.probe import probe_nodes
    from cacp_ray.tuning.experiment import TrialFiles
    from cacp_ray.tuning.finetune import finetune_subnets, make_loggers
    from cacp_ray.tuning.train import Resources

    trials = settings.trials
    project = job.experiment_dir.parent.name
    make_loggers(trials.logging, project)
    is_ladder = settings.finetune.order == "ladder"
    if is_ladder and len(job.folders) == 1:
        logger.info("finetune.order ladder: one rate alone is trained as the search left it")
        is_ladder = False
    one_by_one = is_ladder or settings.finetune.teacher == "larger"  # larger ones come first
    check_order(job.experiment_dir, one_by_one)
    check_address(address)
    logger.info("reading images, starting the trials")
    setup = Setup.create(job.run) if is_ladder and job.run is not None else None
    splits = Splits(job.data)
    train, search, test = splits.open("train"), splits.read("search"), splits.open("test")
    check_splits({"train": train, "search": search, "test": test})
    for name, recipe in settings.recipes.items():
        key = f"variants.{name}.padding" if name else "finetune.padding"
        check_padding(recipe, search, key)
    connect(address)
    labels = trials.label_selector
    if labels is None:
        labels = {} if job.run is None else job.run.cluster.label_selector
    cpus = job.cpus
    is_lone = one_by_one and len(settings.recipes) == 1 and trials.workers == 1
    if is_lone and trials.cpus is None and not trials.gpus:  # one trial at a time
        nodes = read_nodes(labels)
        widest = max((n for node, n in nodes.cpus.items() if node not in nodes.draining), default=0)
        cpus = max(cpus, int(widest))
    least = trials.workers if isinstance(trials.workers, int) else trials.workers[0]
    asked_by = "trials.cpus, trials.gpus, trials.workers"
    check_room(cpus, trials.gpus, address, actors=least, asked_by=asked_by)
    check_labels(labels, address, "trials.label_selector or cluster.label_selector")
    streams = [split for split in (train, test) if isinstance(split, ImageStream)]
    shared = job.experiment_dir.parent if mirror is None else mirror.folder
    probe_nodes([] if shared is None else [shared], streams)
    load_base = make_rebuild(job.model, len(train.classes))  # its file may be here alone
    results: dict[float, Any] = {}
    for where, folders in list_experiments(
        setup, job.folders, job.experiment_dir, one_by_one, cpus
    ):
        load_teacher = load_base
        larger = [rate for rate in results if rate > min(folders)]
        if larger and settings.finetune.teacher == "larger":
            above = read_subnet(job.folders[min(larger)].resolve(), finetuned=True)
            load_teacher = partial(build_network, above, trust=True)
        results |= finetune_subnets(
            load_subnets={
                rate: partial(
                    build_network, read_subnet(path.resolve(), finetuned=False), trust=True
                )
                for rate, path in folders.items()
            },
            load_teacher=load_teacher,
            subnet_folders=folders,
            train_split=train,
            search_split=search,
            test_split=test,
            recipes=settings.recipes,
            experiment_dir=where,
            resources=Resources(cpus, trials.gpus, trials.workers, labels),
            resume=resume,
            on_epoch=on_epoch,
            stops_poor=trials.scheduler == "asha",
            loggers=trials.logging,
            project=project,
            trial_files=None if mirror is None else TrialFiles(*mirror.trials(where.name)),
            source={"model": job.model.model_dump(), "data": job.data.model_dump(mode="json")},
        )
    return results, test
