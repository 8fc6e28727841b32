"""Keep counts as offsets from a sound allocation, for agents that choose all groups at once.

The prior is an allocation for every rate: uniform, or from a map of what each group can lose. An
offset of zero keeps a group at its prior; an offset of a asks for exp(s * a) times as many
channels. All wishes are then scaled together until they fit the budget, and the rest is spent. So
any offsets name a candidate that uses its budget up, at every rate, and offsets found at one rate
are sound at another. The form is ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.searching.budget import Budget, Floats, Ints, scale_to_budget, spend, uniform
from cacp_ray.searching.ranking import cut_at_threshold

Float32s = NDArray[np.float32]


@dataclass(frozen=True)
class Prior:
    """A sound allocation for every rate, from which offsets start.

    Attributes:
        weights: (G,) whether a group shares the cut; the others stay whole where that is feasible.
        damage: Per group (C,) the loss of the network without channel c and all after it, never
            rising with c; the prior then damages all groups alike. None cuts all groups alike.
    """

    weights: NDArray[np.bool_]
    damage: Sequence[Floats] | None = None

    def allocate(self, budget: Budget, rates: ArrayLike) -> Ints:
        """(B, G) keep counts that use the budgets up."""
        if self.damage is None:
            return uniform(budget, rates, self.weights)
        return cut_at_threshold(budget, self.damage, rates)


def uniform_prior(num_groups: int) -> Prior:
    """All groups cut alike."""
    return Prior(np.ones(num_groups, dtype=bool))


class AllocationSpace:
    """Offsets (B, P) of the P groups that may be cut <-> keep counts (B, G) of all groups."""

    def __init__(self, budget: Budget, prior: Prior, scale: float) -> None:
        """Finds the groups that may be cut; a keep count is prior * exp(scale * offset)."""
        self.budget = budget
        self.scale = scale
        self.weights = prior.weights
        self._prior = prior
        self.prunable = np.flatnonzero(budget.min_counts < budget.num_channels)  # (P,)
        self._priors: dict[float, Ints] = {}

    @property
    def num_offsets(self) -> int:
        """P."""
        return len(self.prunable)

    def prior(self, rates: ArrayLike) -> Ints:
        """(B, G) keep counts of zero offsets."""
        wanted = [float(rate) for rate in np.asarray(rates, dtype=np.float64)]
        new = sorted(set(wanted) - self._priors.keys())
        if new:
            self._priors.update(zip(new, self._prior.allocate(self.budget, new), strict=True))
        return np.stack([self._priors[rate] for rate in wanted])

    def decode(self, rates: ArrayLike, offsets: NDArray[np.floating]) -> Ints:
        """(B, G) keep counts of offsets (B, P), within the budgets and spent."""
        return spend(self.budget, self.scaled(rates, offsets), rates)

    def scaled(self, rates: ArrayLike, offsets: NDArray[np.floating]) -> Floats:
        """(B, G) the same before the rest that rounding leaves is spent: much cheaper."""
        budget = self.budget
        ratios: Floats = self.prior(rates) / budget.num_channels
        ratios[:, self.prunable] *= np.exp(self.scale * np.asarray(offsets, dtype=np.float64))
        ratios = np.maximum(ratios, budget.min_counts / budget.num_channels)
        return scale_to_budget(budget, ratios, rates)

    def encode(self, rates: ArrayLike, keep_counts: ArrayLike) -> Float32s:
        """(B, P) offsets of keep counts (B, G); `decode` returns these keep counts or near ones."""
        ratios = np.asarray(keep_counts, dtype=np.float64) / self.prior(rates)
        return (np.log(ratios[:, self.prunable]) / self.scale).astype(np.float32)

    def log_ratios(self, keep_counts: ArrayLike) -> Float32s:
        """(B, P) log keep ratios of keep counts (B, G)."""
        ratios = np.asarray(keep_counts, dtype=np.float64) / self.budget.num_channels
        return np.log(ratios[:, self.prunable]).astype(np.float32)
