"""Builds the network to save from keep counts: cut, repaired and measured in float32."""

from dataclasses import dataclass

from torch import nn

from cacp_ray.data.transforms import from_shared
from cacp_ray.evaluation.classification import Classification
from cacp_ray.evaluation.measurement import Scored, SubnetKey
from cacp_ray.evaluation.preparation import Prepared, cut_networks
from cacp_ray.evaluation.task import OwnTask
from cacp_ray.pruning.calibration import inputs_together
from cacp_ray.pruning.resizable import build_subnet, copy_as
from cacp_ray.pruning.sequential import recover_sequentially


@dataclass(frozen=True)
class Built:
    """A subnet as it would be saved."""

    net: nn.Module  # independent network on the CPU, in float32
    scored: Scored  # by the task, on the whole search split
    is_sequential: bool  # whether sequential recovery made it


class Builder:
    """Builds the subnets of one run, ready to be saved.

    Sequential recovery is tried where it is asked for, and kept where it is better.
    """

    def __init__(
        self,
        prepared: Prepared,
        task: Classification | OwnTask,
        *,
        recovery: str,
        sequential: bool,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """`sequential` repairs once more, layer by layer, after `compensate` alone."""
        self._prepared, self._task, self._device = prepared, task, device
        self._is_sequential, self._seed = sequential and recovery == "compensate", seed
        self._cut_network = cut_networks(prepared, recovery)

    def __call__(self, subnet: SubnetKey) -> Built:
        """Cuts, repairs, measures and copies one subnet."""
        keep_counts, order = subnet
        prepared, cut_network = self._prepared.with_order(order), self._cut_network(order)
        tensors = cut_network.cut(keep_counts)
        scored = self._measure(cut_network.resizable.load(tensors))
        is_sequential = False
        if self._is_sequential:
            repaired = recover_sequentially(
                prepared.model,
                prepared.plan,
                tensors,
                prepared.orders,
                keep_counts,
                inputs_together(prepared.calibration),
                seed=self._seed,
            )
            repaired_scored = self._measure(cut_network.resizable.load(repaired))
            is_sequential = repaired_scored.rank > scored.rank
            if is_sequential:
                tensors, scored = repaired, repaired_scored
        whole = {name: from_shared(value) for name, value in prepared.tensors.items()}
        return Built(build_subnet(prepared.model, whole | tensors), scored, is_sequential)

    def _measure(self, net: nn.Module) -> Scored:
        if self._device != "cpu" or isinstance(self._task, OwnTask):  # which may change it
            net = copy_as(self._prepared.model, net).to(self._device)
        return self._task.measure(net)
