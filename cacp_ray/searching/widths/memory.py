"""What pruned channels were when they were last used, so that they can grow again."""

from typing import Any

import torch
from torch import Tensor, nn

from cacp_ray.pruning.axis import Axis
from cacp_ray.pruning.plan import Plan


class ChannelMemory:
    """Copies of all slices of weights, biases and BN statistics that belong to channels.

    Source: CHEX (Hou et al., CVPR 2022) restores the most recent weights and BN state of channels
    that it grows again. Here a slice is everything that a cut of the channel would remove.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        tensors = dict([*model.named_parameters(), *model.named_buffers()])
        self._tensors = {name: tensors[name] for name, _ in plan.axes}
        self._axes = list(plan.axes.items())
        self.copies = {name: t.detach().clone() for name, t in self._tensors.items()}

    @torch.no_grad()
    def keep(self, masks: list[Tensor]) -> None:
        """Copies the channels of (C,) boolean masks as they are now."""
        for name, dim, positions in self._positions(masks):
            source, at = self._tensors[name].detach(), positions.to(self.copies[name].device)
            self.copies[name].index_copy_(dim, at, source.index_select(dim, at))

    @torch.no_grad()
    def restore(self, masks: list[Tensor]) -> None:
        """Puts the channels of (C,) boolean masks back as they were copied."""
        for name, dim, positions in self._positions(masks):
            at = positions.to(self.copies[name].device)
            self._tensors[name].index_copy_(dim, at, self.copies[name].index_select(dim, at))

    def load(self, copies: dict[str, Tensor]) -> None:
        """Takes the copies of a saved state."""
        for name, copy in copies.items():
            self.copies[name].copy_(copy)

    def _positions(self, masks: list[Tensor]) -> list[tuple[str, int, Tensor]]:
        return [
            (name, dim, positions)
            for (name, dim), axis in self._axes
            if len(positions := _positions_of(axis, masks))
        ]


def _positions_of(axis: Axis, masks: list[Tensor]) -> Tensor:
    chosen = torch.zeros(len(axis.group), dtype=torch.bool)
    channel: Any = torch.as_tensor(axis.channel)
    for group in axis.groups:
        at = torch.as_tensor(axis.group == group)
        chosen[at] = masks[group][channel[at]]
    return chosen.nonzero().flatten()
