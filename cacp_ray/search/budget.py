"""Exact budgets: keep counts that cost at most a rate of the whole, and leave nothing unspent.

Everything here rests on one fact: cost never falls when a keep count grows. So the largest count
that fits is found by bisection, a count that does not fit never fits again, and one code serves
MACs, parameters and any other monotone cost. All functions work on B candidates at once.

Legal keep counts of a group are the multiples of `round_to` and the whole group.
The clamp of one group follows AMC (He et al., 2018, Alg. 1) with the exact cost of coupled groups;
spending the rest is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.errors import InfeasibleRateError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def minimum_counts(num_channels: Ints, floor: float, round_to: int) -> Ints:
    """(G,) smallest legal counts that keep at least `floor` in (0, 1] of every group."""
    wanted = np.maximum(np.ceil(floor * num_channels - 1e-9), 1)
    return np.minimum(round_to * np.ceil(wanted / round_to), num_channels).astype(np.int64)


@dataclass(frozen=True)
class Budget:
    """What keep counts cost and which of them are allowed.

    Attributes:
        cost: int (..., G) -> int64 (...), never falling in any count.
        num_channels: (G,) channels of the whole network.
        min_counts: (G,) smallest legal counts.
        round_to: Keep counts are multiples of this, or whole groups.
    """

    cost: Callable[[Ints], Ints]
    num_channels: Ints
    min_counts: Ints
    round_to: int = 1

    @cached_property
    def total(self) -> int:
        """Cost of the whole network."""
        return int(self.cost(self.num_channels))

    @cached_property
    def smallest(self) -> int:
        """Cost with every group at its smallest count."""
        return int(self.cost(self.min_counts))

    def limit(self, rates: ArrayLike) -> Ints:
        """(B,) largest allowed costs."""
        return np.floor(np.asarray(rates, dtype=np.float64) * self.total).astype(np.int64)

    def check(self, rate: float) -> None:
        """Refuses a rate that no legal keep counts reach.

        Raises:
            InfeasibleRateError: Even the smallest counts cost more, or the rate is above 1.
        """
        reachable = np.ceil(1e4 * self.smallest / self.total) / 1e4
        if self.limit(rate) < self.smallest:
            raise InfeasibleRateError(
                f"rate {rate:.4f} is below the reachable {reachable:.4f} of the whole cost: "
                "raise the rate, lower `floor`, or let more groups be pruned"
            )
        if rate > 1:
            raise InfeasibleRateError(
                f"rate {rate:.4f}: a rate is the share of the cost that is kept, "
                f"between {reachable:.4f} and 1"
            )

    def count(self, levels: Ints, groups: slice | int = slice(None)) -> Ints:
        """Legal counts by level: level l keeps l * round_to channels, or all there are."""
        return np.minimum(levels * self.round_to, self.num_channels[groups])

    def floor_to_legal(self, counts: Floats, groups: slice | int = slice(None)) -> Ints:
        """Largest legal counts up to the given ones, but at least the smallest allowed."""
        whole, least = self.num_channels[groups], self.min_counts[groups]
        levels = np.floor(counts / self.round_to).astype(np.int64)
        return np.where(counts >= whole, whole, np.maximum(levels * self.round_to, least))

    def nearest_legal(self, counts: Floats, groups: slice | int = slice(None)) -> Ints:
        """Nearest legal counts, the larger on a tie."""
        below = self.floor_to_legal(counts, groups)
        above = self.count(below // self.round_to + 1, groups)
        return np.where(2 * counts >= below + above, above, below)


def clamp(budget: Budget, counts: Ints, group: int, wanted: Floats, limit: Ints) -> Ints:
    """(B,) legal counts of one group: the nearest to `wanted` that the budget allows.

    Args:
        budget: The budget.
        counts: (B, G) decided groups first, all groups after `group` at their smallest counts.
        group: Index of the group to decide.
        wanted: (B,) desired counts.
        limit: (B,) largest allowed costs.
    """
    trial = counts.copy()
    trial[:, group] = budget.nearest_legal(wanted, group)
    if (budget.cost(trial) <= limit).all():
        return trial[:, group]
    # Level `low` fits, or is the floor; level `high` does not, or is above the wanted one.
    low = np.full(len(counts), budget.min_counts[group] // budget.round_to)
    high = -(-trial[:, group] // budget.round_to) + 1
    while (high - low > 1).any():
        middle = (low + high) // 2
        trial[:, group] = budget.count(middle, group)
        fits = budget.cost(trial) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return np.maximum(budget.count(low, group), budget.min_counts[group])


def prior_counts(
    budget: Budget, counts: Ints, first: int, weights: NDArray[np.bool_], limit: Ints
) -> Ints:
    """(B, G) counts that share the unspent budget evenly over the groups not decided yet.

    Groups with weight 1 keep the same share u; groups with weight 0 stay whole, and shrink
    together only where the budget cannot be met with all others at their smallest counts.
    Rounded down, so that rounding starves no later group; what is left is not spent.

    Args:
        budget: The budget.
        counts: (B, G) keep counts; those before `first` are decided.
        first: First undecided group.
        weights: (G,) whether a group shares the cut.
        limit: (B,) largest allowed costs.
    """
    trial = counts.copy()
    weights, channels = weights[first:], budget.num_channels[first:]

    def fill(level: Floats) -> None:
        # Level 0..1 grows the weight-0 groups, level 1..2 the others.
        ratio = np.where(weights, level[:, None] - 1, level[:, None])
        trial[:, first:] = budget.floor_to_legal(ratio * channels, slice(first, None))

    low, high = np.zeros(len(counts)), np.full(len(counts), 2 + 1e-3)
    for _ in range(17):
        middle = (low + high) / 2
        fill(middle)
        fits = budget.cost(trial) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    fill(low)
    return trial


def grow(budget: Budget, counts: Ints, desired: Floats, limit: Ints) -> Ints:
    """Spends what is left: grows legal counts until no group can take one more step.

    The next step goes to the group with the smallest count / desired that can take it, the first
    on a tie.

    Args:
        budget: The budget.
        counts: (B, G) legal counts within the limit.
        desired: (B, G) positive counts.
        limit: (B,) largest allowed costs.
    """
    # All groups rise together to the highest common count / desired that fits. No step on that
    # way is refused, so it equals the single steps below, which take over where one is.
    low = np.zeros(len(counts))
    high = (budget.num_channels / desired).max(axis=1) * 1.001
    for _ in range(20):
        middle = (low + high) / 2
        levels = np.ceil(middle[:, None] * desired / budget.round_to).astype(np.int64)
        fits = budget.cost(np.maximum(counts, budget.count(levels))) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    levels = np.ceil(low[:, None] * desired / budget.round_to).astype(np.int64)
    counts = np.maximum(counts, budget.count(levels))

    rows = np.arange(len(counts))
    is_open = counts < budget.num_channels
    while is_open.any():
        group = np.where(is_open, counts / desired, np.inf).argmin(axis=1)
        trial = counts.copy()
        trial[rows, group] = budget.count(counts[rows, group] // budget.round_to + 1, group)
        fits = is_open[rows, group] & (budget.cost(trial) <= limit)
        counts = np.where(fits[:, None], trial, counts)
        is_open[rows, group] = fits & (counts[rows, group] < budget.num_channels[group])
    return counts


def spend(budget: Budget, desired: Floats, rates: ArrayLike) -> Ints:
    """(B, G) keep counts near the desired ones that use up the budgets, never more.

    Args:
        budget: The budget.
        desired: (B, G) counts, clipped to what is allowed.
        rates: (B,) share of the whole cost that may be kept, each reachable.
    """
    limit = budget.limit(rates)
    desired = np.clip(desired, budget.min_counts, budget.num_channels)
    counts = np.tile(budget.min_counts, (len(desired), 1))
    for group in range(counts.shape[1]):
        counts[:, group] = clamp(budget, counts, group, desired[:, group], limit)
    return grow(budget, counts, desired, limit)


def uniform(budget: Budget, rates: ArrayLike, weights: ArrayLike) -> Ints:
    """(B, G) the same keep ratio for all groups of weight 1, the others whole where feasible.

    Solved group by group, as the zero action of the agent is.

    Args:
        budget: The budget.
        rates: (B,) share of the whole cost that may be kept, each reachable.
        weights: (G,) 1 for groups that share the cut, 0 for those kept whole.
    """
    limit = budget.limit(rates)
    weights = np.asarray(weights, dtype=bool)
    counts = np.tile(budget.min_counts, (len(limit), 1))
    for group in range(counts.shape[1]):
        counts[:, group] = prior_counts(budget, counts, group, weights, limit)[:, group]
    return grow(budget, counts, counts.astype(np.float64), limit)
