"""Exact budgets: keep counts that cost at most a rate of the whole, and leave nothing unspent.

Everything here rests on one fact: cost never falls when a keep count grows. So the largest count
that fits is found by bisection, a count that does not fit never fits again, and one code serves
MACs, parameters and any other monotone cost.

All functions work on B candidates of G groups at once: keep counts are (B, G), rates (B,) shares of
the whole cost, each reachable, and limits (B,) the largest allowed costs.
Legal keep counts of a group are the multiples of `round_to` and the whole group.
The clamp of one group follows AMC (He et al., 2018, Alg. 1) with the exact cost of coupled groups;
spending the rest is ours.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from numbers import Real

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.errors import ConfigError, InfeasibleRateError

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def minimum_counts(num_channels: Ints, floor: float, round_to: int) -> Ints:
    """(G,) smallest legal counts that keep at least `floor` in (0, 1] of every group."""
    wanted = np.maximum(np.ceil(floor * num_channels - 1e-9), 1)
    return np.minimum(round_to * np.ceil(wanted / round_to), num_channels).astype(np.int64)


@dataclass(frozen=True)
class Budget:
    """The cost of keep counts, and the legal ones.

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
            ConfigError: The rate is no number.
            InfeasibleRateError: Even the smallest counts cost more, or the rate is above 1.
        """
        if not isinstance(rate, Real) or math.isnan(rate):
            raise ConfigError(f"rate {rate!r}: give a number, the share of the cost that is kept")
        reachable = np.ceil(1e4 * self.smallest / self.total) / 1e4
        if self.limit(rate) < self.smallest:
            raise InfeasibleRateError(
                f"rate {rate:.4f} is below the reachable {reachable:.4f} of the whole cost: "
                "raise the rate, lower pruning.floor, or let more groups be pruned"
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


def largest(fits: Callable[[Floats], NDArray[np.bool_]], low: Floats, high: Floats) -> Floats:
    """(B,) largest levels that fit, to 1/65536 of the range.

    `fits` falls from True to False along P of levels (B, P); `low` (B,) fit, and `high` (B,) do not
    or need not be reached.
    """
    rows = np.arange(len(low))
    for _ in range(4):
        grid = low[:, None] + (high - low)[:, None] * np.linspace(0, 1, 17)
        last = fits(grid[:, 1:-1]).sum(axis=1)
        low, high = grid[rows, last], grid[rows, last + 1]
    return low


def clamp(budget: Budget, counts: Ints, group: int, wanted: Floats, limit: Ints) -> Ints:
    """(B,) legal counts of one group: the largest up to `wanted` that the budget allows.

    Rounding down, never up, keeps the last groups from paying for the rounding of all others. All
    groups after `group` stand at their smallest counts.
    """
    trial = counts.copy()
    wanted = wanted + 1e-3  # a count recomputed from its action must not lose a channel
    trial[:, group] = budget.floor_to_legal(wanted, group)
    is_within = budget.cost(trial) <= limit
    if is_within.all():
        return trial[:, group]

    def fits(level: Floats) -> NDArray[np.bool_]:
        trials = np.repeat(counts[:, None], level.shape[1], axis=1)
        trials[..., group] = budget.floor_to_legal(level, group)
        return budget.cost(trials) <= limit[:, None]

    least = np.full(len(counts), budget.min_counts[group], np.float64)
    clamped = budget.floor_to_legal(largest(fits, least, np.maximum(wanted, least) + 1), group)
    return np.where(is_within, trial[:, group], clamped)


def share_out(
    budget: Budget, counts: Ints, first: int, base: Ints, weights: NDArray[np.bool_], limit: Ints
) -> Ints:
    """(B, G) counts that share the unspent budget over the groups from `first` on.

    Groups with weight 1 keep the same multiple of `base`, (B, G) or (G,); groups with weight 0 keep
    `base`, and shrink together only where the budget cannot be met with all others at their
    smallest counts. Less than one step of some group stays unspent.
    """
    undecided = slice(first, None)
    weights, base = weights[undecided], np.atleast_2d(base)[:, None, undecided]

    def candidates(level: Floats) -> Ints:
        # Levels up to 1 grow the groups of weight 0, those above 1 the others.
        level = level[..., None]
        share = np.where(weights, np.maximum(level - 1, 0), np.minimum(level, 1))
        trials = np.repeat(counts[:, None], level.shape[1], axis=1)
        wanted: Floats = share * base.astype(np.float64)
        trials[..., undecided] = budget.nearest_legal(wanted, undecided)
        return trials

    # The range depends on the candidate alone, so the other candidates of a batch do not matter.
    ratio: Floats = np.max(budget.num_channels[undecided] / base, axis=(1, 2))
    high = np.broadcast_to(1.001 + ratio, len(counts))
    level = largest(lambda level: budget.cost(candidates(level)) <= limit[:, None], 0 * high, high)
    return candidates(level[:, None])[:, 0]


def grow(budget: Budget, counts: Ints, desired: Floats, limit: Ints) -> Ints:
    """Spends the rest of the budget: grows legal counts until no group can take one more step.

    The next step goes to the group with the smallest count / desired (B, G) that can take it, the
    first on a tie.
    """

    # All groups first rise together to the highest common count / desired that fits. None of these
    # steps would be refused below, so the result equals that of single steps, which follow.
    def raised(level: Floats) -> Ints:
        steps = np.ceil(level[..., None] * desired[:, None] / budget.round_to).astype(np.int64)
        return np.maximum(counts[:, None], budget.count(steps))

    high: Floats = np.max(budget.num_channels / desired, axis=1) * 1.001
    level = largest(lambda level: budget.cost(raised(level)) <= limit[:, None], 0 * high, high)
    counts = raised(level[:, None])[:, 0]

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
    """(B, G) keep counts near the desired ones (B, G) that use up the budgets, never more."""
    limit = budget.limit(rates)
    desired = np.clip(desired, budget.min_counts, budget.num_channels)
    counts = np.tile(budget.min_counts, (len(desired), 1))
    for group in range(counts.shape[1]):
        counts[:, group] = clamp(budget, counts, group, desired[:, group], limit)
    return grow(budget, counts, desired, limit)


def scale_to_budget(budget: Budget, keep_ratios: Floats, rates: ArrayLike) -> Floats:
    """(B, G) counts: keep ratios in (0, 1] times the largest common factor that fits the budget."""

    def scaled(factor: Floats) -> Ints:
        # Rounded down, so that no group is cut later to pay for the rounding of another.
        return budget.floor_to_legal(factor[:, None] * keep_ratios * budget.num_channels)

    limit = budget.limit(rates)
    low: Floats = np.zeros(len(limit))
    high: Floats = 1.001 / keep_ratios.min(axis=1)
    for _ in range(30):
        middle = (low + high) / 2
        fits = budget.cost(scaled(middle)) <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle)
    return scaled(low).astype(np.float64)


def uniform(budget: Budget, rates: ArrayLike, weights: ArrayLike) -> Ints:
    """(B, G) the same keep ratio for all groups of weight 1, the others whole where feasible."""
    limit, channels = budget.limit(rates), budget.num_channels
    counts = np.tile(budget.min_counts, (len(limit), 1))
    counts = share_out(budget, counts, 0, channels, np.asarray(weights, dtype=bool), limit)
    return grow(budget, counts, np.tile(channels, (len(limit), 1)).astype(np.float64), limit)
