"""Fine-tuning of a run by a training function of the user's own."""

# pyright: basic
# Basic: tasks, networks and training functions are the user's own.

import inspect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cacp_ray.config.saved import read_run_config
from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.preparation import hash_weights
from cacp_ray.io.clock import Clock
from cacp_ray.io.files import write_json
from cacp_ray.io.schema import read_checked
from cacp_ray.models.factory import GIVEN, import_function
from cacp_ray.pruning.subnet import read_subnet
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.mirror import RunMirror
from cacp_ray.rundir.schema import ModelFile, ReportedFile
from cacp_ray.training.recipe import Order
from cacp_ray.workflows.ladder import check_order, list_experiments, note_trained
from cacp_ray.workflows.network import check_hash, load_model
from cacp_ray.workflows.problem import Given, find_task
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.storage import make_push, training_into


def finetune_by_task(
    run_dir: Path,
    train: Callable[..., object] | str | None = None,
    *,
    given: Given | None = None,
    order: Order | None = None,
    resume: bool = False,
    address: str | None = None,
    mirror: RunMirror | None = None,
    on_report: Callable[[dict[str, Any]], object] = lambda report: None,
) -> dict[str, Any]:
    """Trains the subnet of every rate by a user's function, each as a trial of Ray Tune.

    They are trained side by side, or one after another down the ladder (`finetune.order`).

    Args:
        run_dir: Run directory of a search with a task of the user's own.
        train: (network, context) -> nothing; see `cacp_ray.tuning.own.TrainContext`. None takes the
            method `train` of the task.
        given: Network and task of a search that was given them as objects.
        order: As `finetune.order`; None takes that of the run.
        resume: Whether to go on with an interrupted fine-tuning.
        address: Address of a Ray cluster.
        mirror: The copy of the run on other storage, in which trials write; None: in the run.
        on_report: Called with every report of a trial: its rate and figures.

    Returns:
        The content of result.json.

    Raises:
        CacpError: Bad input, or a trial that failed too often.
    """
    from cacp_ray.distributed.cluster import check_address, check_room, connect
    from cacp_ray.distributed.nodes import check_labels
    from cacp_ray.distributed.tasks import check_sendable
    from cacp_ray.tuning.experiment import TrialFiles
    from cacp_ray.tuning.own import OwnJob, finetune_own

    config, clock = read_run_config(run_dir), Clock()
    task = find_task(config, given)
    if task is None:
        raise ConfigError(
            f"{run_dir} classifies images: fine-tune it without a function of your own, by "
            "`cacp-ray finetune` or cacp_ray.finetune"
        )
    function = _find_train(train, task.content, task.name)
    saved = read_checked(run_dir / "model.json", ModelFile, ("sha256",))
    result = read_result(run_dir, ReportedFile)
    is_given = config.model.name.startswith(GIVEN)
    if given is not None and given.model is not None:
        whole = given.model
    elif is_given:
        raise ConfigError("the network of this run was given in Python: give it again (model=...)")
    else:
        whole = load_model(config.model, None)
    check_hash(hash_weights(whole.state_dict()), saved, run_dir)
    experiment_dir = run_dir / "finetune"
    is_ladder = (order or config.finetune.order) == "ladder" and len(result["rates"]) > 1
    check_order(experiment_dir, is_ladder)
    setup = Setup.create(config, run_dir, given) if is_ladder else None
    check_address(address)
    cluster = config.cluster
    gpus = 0.0 if cluster.gpus_per_evaluator == "auto" else float(cluster.gpus_per_evaluator)
    connect(address, runtime_env=cluster.runtime_env)
    check_room(cluster.cpus_per_evaluator, gpus, address)
    check_labels(cluster.label_selector, address, "cluster.label_selector")
    check_sendable({"train": function}, "trials")
    searched = {row["rate"]: (run_dir / row["path"]).resolve() for row in result["rates"]}
    job = OwnJob(
        {},
        task,
        function,
        whole,
        is_given,
        cluster.cpus_per_evaluator,
        gpus,
        cluster.label_selector,
    )

    push = make_push(mirror, run_dir)

    def note(report: dict[str, Any]) -> None:
        push()
        on_report(report)

    with training_into(mirror, run_dir):
        trained: dict[float, dict[str, Any]] = {}
        model = whole if is_given else None
        with clock.phase("finetune"):
            for where, folders in list_experiments(
                setup, searched, experiment_dir, is_ladder, job.cpus, model
            ):
                subnets = {
                    rate: read_subnet(folder, finetuned=False) for rate, folder in folders.items()
                }
                trained |= finetune_own(
                    replace(job, subnets=subnets),
                    folders,
                    where,
                    resume=resume,
                    on_report=note,
                    trial_files=None if mirror is None else TrialFiles(*mirror.trials(where.name)),
                )
        for row in result["rates"]:
            note_trained(row, run_dir)
            row["finetuned_score"] = trained[row["rate"]]["score"]
        result["seconds"] |= clock.seconds
        write_json(run_dir / "result.json", result)
    return result


def _find_train(given: Any, content: Any, name: str) -> Any:
    train = given if given is not None else getattr(content, "train", None)
    if train is None:
        raise ConfigError(
            f"task {name} has no method train(net, context), and no function was given: add "
            "one, or train the subnets elsewhere and call cacp_ray.save_finetuned"
        )
    if isinstance(train, str):
        return import_function("train", train, "net", "context")
    try:
        inspect.signature(train).bind("net", "context")
    except (TypeError, ValueError) as error:
        raise ConfigError(f"train must take (net, context): {error}") from error
    return train
