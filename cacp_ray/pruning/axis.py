"""One dimension of a parameter or buffer that follows channel groups."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Axis:
    """One dimension of a parameter or buffer that follows channel groups."""

    group: NDArray[np.int64]  # (size,) group of each position, -1 for positions that always stay
    channel: NDArray[np.int64]  # (size,) channel of its group, 0 where the position always stays

    @property
    def groups(self) -> list[int]:
        """Groups that some position follows, in rising order."""
        return sorted(set(self.group.tolist()) - {-1})

    def positions(self, keep_counts: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Positions that remain when every group keeps its first K channels."""
        counts = np.append(np.asarray(keep_counts), 1)  # group -1 reads the last entry
        return np.flatnonzero(self.channel < counts[self.group])

    def reordered(self, orders: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
        """Position p of the reordered network holds position `result[p]` of the original.

        Channel i of the reordered group g is channel orders[g][i] of the original.
        """
        result = np.arange(len(self.group))
        for group in self.groups:
            order = orders[group]
            positions = np.flatnonzero(self.group == group)
            by_channel = positions[np.argsort(self.channel[positions], kind="stable")]
            table = by_channel.reshape(len(order), -1)  # (C, positions of a channel)
            result[table] = table[order]
        return result

    @property
    def single_group(self) -> int | None:
        """The group of all positions where the kept ones are always the leading ones, else None."""
        group = int(self.group[0])
        if group < 0 or (self.group != group).any() or (np.diff(self.channel) < 0).any():
            return None
        return group

    @property
    def multiplicity(self) -> int:
        """Positions of each channel, for an axis of a single group."""
        return len(self.group) // (int(self.channel[-1]) + 1)


def drops_groups(num_channels: int, groups: int) -> bool:
    """Whether a grouped layer of `num_channels` inputs loses whole parts rather than lanes.

    Many narrow parts (depthwise, ResNeXt's 32 x 4) stay or go whole, and the layer gets fewer of
    them; few wide parts all stay, and each keeps the same lanes.
    """
    return groups >= num_channels // groups
