"""One model trained by several workers: Ray Train inside a Tune trial.

Each worker has its part of every batch, gradients are averaged by DistributedDataParallel (NCCL on
GPUs, gloo on CPUs), and BN statistics stay each worker's own. Every worker measures the search
split, on equal weights; the first one's report counts.

Where a range of workers is asked for, Ray begins with those that there is room for, goes on with
fewer from the last epoch when nodes are lost, and looks once a minute for room for more. A batch is
shared by those that there are, so that the schedule stays the same.
"""

from typing import TYPE_CHECKING, Any

import ray
from ray import tune
from ray._private.state import state
from ray.core.generated.gcs_pb2 import PlacementGroupTableData  # type: ignore[attr-defined]
from ray.train import Checkpoint as TrainCheckpoint
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    get_checkpoint,
    get_context,
    report,
)
from ray.train.torch import TorchTrainer, get_device
from ray.tune.experiment import Trial
from ray.tune.integration.ray_train import TuneReportCallback
from ray.util.placement_group import PlacementGroup, remove_placement_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from cacp_ray.tuning.trial import TrialTask

COORDINATOR_CPUS = 0.001  # of the trial itself, which only waits for its workers
MAX_TRIALS = 8  # at once
# Left free by a worker, so that one fits beside these trials on a node: Ray counts the workers that
# a node has room for as if it were empty.
SPARE_CPUS = 0.01
STEPS_BETWEEN = 10  # of Tune's loop, a tenth of a second each while nothing happens


def train_in_workers(config: dict[str, Any], task: "TrialTask", splits: list[Any]) -> None:
    """Runs a trial's workers to the end; those that were killed start again at their last epoch.

    Args:
        config: Of the trial.
        task: Of the experiment.
        splits: References of the images to learn from and of the search split.
    """
    resources = task.resources
    trainer = TorchTrainer(
        _work,
        train_loop_config={
            "config": dict(config),
            "task": task,
            "splits": splits,
        },
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={
                "CPU": resources.cpus - SPARE_CPUS,
                **({"GPU": resources.gpus} if resources.gpus else {}),
            },
        ),
        run_config=RunConfig(
            name="workers",  # found again by a trial that is restarted
            storage_path=tune.get_context().get_trial_dir(),
            callbacks=[TuneReportCallback()],
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()


def _work(shared: dict[str, Any]) -> None:
    from cacp_ray.tuning.trial import train_subnet

    context = get_context()
    rank = context.get_world_rank()
    train_split, search_split = ray.get(shared["splits"])

    def send(metrics: dict[str, Any], folder: str) -> None:
        report(metrics, checkpoint=None if rank else TrainCheckpoint.from_directory(folder))

    def wrap(model: nn.Module) -> nn.Module:
        device = get_device()
        ids = [device.index] if device.type == "cuda" else None  # type: ignore[union-attr]
        return DistributedDataParallel(model, device_ids=ids)

    train_subnet(
        shared["config"],
        shared["task"],
        train_split,
        search_split,
        get_checkpoint(),
        send,
        shard=(rank, context.get_world_size()),
        wrap=wrap,
    )


class FreeAbandoned(tune.Callback):
    """Gives back what the workers of a trial that died had reserved.

    Ray Train leaves that to an actor that asks the dashboard whether the trial's controller lives.
    Where there is no dashboard, as on a laptop, the trial's next workers would wait for ever.
    """

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called by Tune in the driver."""
        if iteration % STEPS_BETWEEN == 0:
            free_abandoned()


def free_abandoned() -> None:
    """Removes placement groups of this job whose creator is dead; Ray waits for the job's end."""
    job = ray.get_runtime_context().get_job_id()
    # Ray's public tables leave out who made a group.
    for row in state._connect_and_get_accessor().get_placement_group_table():
        group = PlacementGroupTableData.FromString(row)
        # Of one that the driver itself made, Ray says so too.
        is_orphan = group.creator_actor_dead and not ray.ActorID(group.creator_actor_id).is_nil()
        is_held = group.state != group.REMOVED and not group.is_detached
        if group.creator_job_id.hex() == job and is_orphan and is_held:
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(group.placement_group_id)))
