"""Keep counts -> the network to save: cut, repaired, measured in float32."""

import copy
from dataclasses import dataclass

from torch import Tensor, nn

from cacp_ray.data.images import ImageSet
from cacp_ray.data.transforms import from_shared
from cacp_ray.evaluation.measurement import Subnet
from cacp_ray.evaluation.preparation import Cutters, Prepared
from cacp_ray.pruning.sequential import recover_sequentially
from cacp_ray.pruning.surgery import build_subnet
from cacp_ray.training.metrics import Accuracy, measure_split


@dataclass(frozen=True)
class Built:
    """A subnet as it would be saved.

    Attributes:
        net: On the CPU, in float32.
        accuracy: On the whole search split.
        is_sequential: Whether sequential recovery made it.
    """

    net: nn.Module
    accuracy: Accuracy
    is_sequential: bool


class Builder:
    """A subnet -> the network to save.

    Sequential recovery is tried where it is asked for, and kept where it is better.
    """

    def __init__(
        self,
        prepared: Prepared,
        split: ImageSet,
        *,
        recovery: str,
        sequential: bool,
        seed: int,
        device: str = "cpu",
    ) -> None:
        """Takes what all subnets share.

        Args:
            prepared: Of the base network.
            split: The search split.
            recovery: `none`, `bn` or `compensate`.
            sequential: Whether to repair once more; after `compensate` only.
            seed: Of the places that sequential recovery draws.
            device: That measures.
        """
        self._prepared, self._split = prepared, split
        self._is_sequential, self._seed = sequential and recovery == "compensate", seed
        self._cutters = Cutters(prepared, recovery)
        self._device = device

    def __call__(self, subnet: Subnet) -> Built:
        """Cuts, repairs and measures."""
        keep_counts, order = subnet
        prepared, cutter = self._prepared.with_order(order), self._cutters[order]
        tensors = cutter.cut(keep_counts)
        accuracy = self._measure(cutter.skeleton.load(tensors))
        is_sequential = False
        if self._is_sequential:
            repaired = recover_sequentially(
                prepared.model,
                prepared.plan,
                tensors,
                prepared.orders,
                keep_counts,
                prepared.calibration.tensors()[0],
                seed=self._seed,
            )
            found = self._measure(cutter.skeleton.load(repaired))
            is_sequential = (found.top1, -found.loss) > (accuracy.top1, -accuracy.loss)
            if is_sequential:
                tensors, accuracy = repaired, found
        ordered: dict[str, Tensor] = {
            name: from_shared(value) for name, value in prepared.tensors.items()
        }
        return Built(build_subnet(prepared.model, ordered | tensors), accuracy, is_sequential)

    def _measure(self, net: nn.Module) -> Accuracy:
        if self._device == "cpu":
            return measure_split(net, self._split)
        return measure_split(copy.deepcopy(net).to(self._device), self._split)
