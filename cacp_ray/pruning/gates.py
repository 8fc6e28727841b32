"""Gates on the channels of a network: factors at the inputs of all layers that mix them.

A closed gate is a cut channel, but where a layer normalises over the channels of a group
(`Plan.normalised`): it still counts the zeros. Coupled layers share one gate. Transposed and
grouped convolutions have none.
"""

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cacp_ray.pruning.plan import Consumer, Plan
from cacp_ray.pruning.torch_types import Convolution, split

GATED = (Convolution, nn.Linear)  # layers whose input channels get gates


class ChannelGates:
    """Multiplies the channels of all groups by their gates, until `remove`.

    Attributes:
        size: Number of gates S: the channels of all groups, one group after another.
        values: (S,) gates of all images, or (N, S) gates of each; None leaves all open.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Attaches the gates to a network, which keeps its tensors as they are."""
        self._plan = plan
        self._sizes = [group.num_channels for group in plan.groups]
        self._offsets = np.cumsum([0, *self._sizes])
        self.size = int(self._offsets[-1])
        self.values: Tensor | None = None
        layers = [(model.get_submodule(c.module), c) for c in plan.consumers]
        self._layers = [(layer, c) for layer, c in layers if isinstance(layer, GATED)]
        self._columns = {c.weight: self._find_columns(c) for _, c in self._layers}
        self._hooks = [self._attach(layer, c) for layer, c in self._layers]

    def split(self, values: Tensor) -> list[Tensor]:
        """(S,) numbers as one (C,) tensor for each group."""
        return split(values, self._sizes)

    @torch.no_grad()
    def fold(self) -> None:
        """Puts gates (S,) into the weights that read the channels, and opens them."""
        if self.values is None:
            return
        for layer, consumer in self._layers:
            weight = layer.get_parameter(consumer.weight.rpartition(".")[2])
            gates = self._read(consumer, self.values.to(weight))[0]
            weight.mul_(gates.reshape(-1, *[1] * (weight.ndim - 2)))
        self.values = None

    def remove(self) -> None:
        """Takes all gates off the network."""
        for hook in self._hooks:
            hook.remove()

    def _attach(self, module: nn.Module, consumer: Consumer) -> RemovableHandle:
        def gate(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            if self.values is None:
                return None
            x = args[0]
            gates = self._read(consumer, self.values.to(x.device)).to(x.dtype)  # (1 or N, C_in)
            if len(gates) > 1:  # windows of one image may have become neighbouring batch entries
                gates = gates.repeat_interleave(len(x) // len(gates), 0)
            ones, is_linear = [1] * (x.ndim - 2), isinstance(module, nn.Linear)
            shape = (len(gates), *ones, -1) if is_linear else (len(gates), -1, *ones)
            return (x * gates.reshape(shape), *args[1:])

        return module.register_forward_pre_hook(gate)

    def _read(self, consumer: Consumer, values: Tensor) -> Tensor:
        """(1 or N, C_in) gates of the positions of a layer's input."""
        values = values.reshape(-1, self.size)
        columns, always_open = self._columns[consumer.weight]
        if always_open:  # positions of no group read a last gate
            values = torch.cat([values, values.new_ones(len(values), 1)], 1)
        return values[:, columns.to(values.device)]

    def _find_columns(self, consumer: Consumer) -> tuple[Tensor, bool]:
        """(C_in,) the gate of each position, and whether some positions always stay."""
        axis = self._plan.axes[consumer.weight, 1]
        columns = np.where(axis.group < 0, self.size, self._offsets[axis.group] + axis.channel)
        return torch.as_tensor(columns), bool((axis.group < 0).any())
