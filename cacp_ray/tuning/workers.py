"""One model trained by several workers: Ray Train inside a Tune trial.

Each worker has its part of every batch, DistributedDataParallel averages the gradients (NCCL on
GPUs, gloo on CPUs), and BN statistics stay each worker's own. Every worker measures the search
split, on equal weights; the report of the first counts.

For a range of workers, Ray begins with as many as there is room for. When nodes are lost it goes on
with fewer from the last epoch, and once a minute it looks for room for more. The workers present
share each batch, so the schedule stays the same.
"""

from typing import TYPE_CHECKING, Any

import ray
from ray import tune
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
from ray.util.placement_group import remove_placement_group
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from cacp_ray.distributed.internals import placement_groups_of_dead_creators

if TYPE_CHECKING:
    from cacp_ray.tuning.train import TrialTask

COORDINATOR_CPUS = 0.001  # of the trial itself, which only waits for its workers
MAX_TRIALS = 8  # at once
# Spare CPU per worker for those trials: Ray counts workers per node as if the node were empty.
SPARE_CPUS = 0.01
STEPS_BETWEEN = 10  # steps of Tune's loop between checks; an idle step takes a tenth of a second


def train_in_workers(config: dict[str, Any], task: "TrialTask", splits: list[Any]) -> None:
    """Runs a trial's workers to the end; killed workers start again at their last epoch."""
    from cacp_ray.tuning.train import name_trial

    resources = task.resources
    trainer = TorchTrainer(
        _work,
        train_loop_config={"config": dict(config), "task": task, "splits": splits},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            label_selector=dict(resources.labels) or None,
            resources_per_worker={
                "CPU": resources.cpus - SPARE_CPUS,
                **({"GPU": resources.gpus} if resources.gpus else {}),
            },
        ),
        run_config=RunConfig(
            name="workers",  # a trial that is restarted finds its workers' state by this
            # Tune's context names a folder of this node alone.
            storage_path=f"{task.trials}/{name_trial(config)}",
            storage_filesystem=task.filesystem,
            callbacks=[TuneReportCallback()],
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            failure_config=FailureConfig(max_failures=2),
        ),
    )
    trainer.fit()


def _work(shared: dict[str, Any]) -> None:
    from cacp_ray.tuning.train import train_subnet

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
    """Frees what the workers of a dead trial had reserved.

    Ray Train leaves this to an actor that asks the dashboard whether the trial's controller lives.
    Without a dashboard, as on a laptop, the trial's next workers would wait for ever.
    """

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        """Called by Tune in the driver."""
        if iteration % STEPS_BETWEEN == 0:
            free_abandoned()


def free_abandoned() -> None:
    """Removes placement groups of this job whose creator is dead."""
    for group in placement_groups_of_dead_creators():
        remove_placement_group(group)
