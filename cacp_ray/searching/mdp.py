"""Channel allocation as a Markov decision process: one group a step, many candidates at once.

Groups that stay whole have no step: T steps for G groups.

The prior is an allocation for every rate (searching/allocation.py). At every step the budget not
yet spent is shared over the groups still to come, in proportion to the prior. A zero action keeps
this share: zero actions give the prior itself, and one bold step starves no group after it. An
action a in [-1, 1] keeps exp(s * a) times as many channels, the budget clamps it, and the rest is
spent after the last group. So no episode ends above its budget and none below it needlessly.
`play`, `replay` and the Gymnasium environment (env.py) share the same steps.

The first 12 state features are those of CACP (2021, Table D); the prior keep ratio, its re-solving
at every step and the final spending are ours.
"""

from collections.abc import Callable, Sequence
from operator import attrgetter

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.allocation import AllocationSpace, Float32s, Prior
from cacp_ray.searching.budget import Budget, Floats, Ints, clamp, grow, share_out

Act = Callable[[Float32s, int], NDArray[np.floating]]  # states (B, F) and step -> actions (B,)

NUM_FEATURES = 13


class AllocationMDP:
    """The arithmetic of an episode, vectorised over B episodes."""

    state_size = NUM_FEATURES

    def __init__(
        self, cost_model: CostModel, budget: Budget, prior: Prior, action_scale: float
    ) -> None:
        """Prepares the static features; a keep count is prior * exp(action_scale * a)."""
        self.budget = budget
        self.space = AllocationSpace(budget, prior, action_scale)
        self.groups = [int(group) for group in self.space.prunable]
        self.num_steps = len(self.groups)
        self.action_scale = action_scale
        self._static = _static_features(cost_model, budget)[self.groups]  # (T, 8)

    def prior(self, rates: ArrayLike) -> Ints:
        """(B, G) keep counts of zero actions."""
        return self.space.prior(rates)

    def start(self, rates: ArrayLike) -> Ints:
        """(B, G) counts before the first step: every group at its smallest."""
        return np.tile(self.budget.min_counts, (len(np.asarray(rates)), 1))

    def observe(self, rates: ArrayLike, counts: Ints, step: int) -> tuple[Float32s, Ints]:
        """States (B, F), about within [0, 1], and counts (B,) of the step's group at zero action.

        In `counts` (B, G), the groups of this and later steps stand at their smallest counts.
        """
        budget, total, group = self.budget, self.budget.total, self.groups[step]
        rates = np.asarray(rates, dtype=np.float64)
        base, limit = self.prior(rates), budget.limit(rates)
        prior = share_out(budget, counts, group, base, self.space.weights, limit)[:, group]
        whole = counts.copy()
        whole[:, group:] = budget.num_channels[group:]
        most, least = budget.cost(whole), budget.cost(counts)
        before = self.groups[step - 1]
        states = np.empty((len(rates), NUM_FEATURES), dtype=np.float32)
        states[:, :8] = self._static[step]
        states[:, 8] = rates
        states[:, 9] = 1 - most / total  # Reduced
        states[:, 10] = (most - least) / total  # Rest: cost that can still be removed
        states[:, 11] = counts[:, before] / budget.num_channels[before] if step else 1.0
        states[:, 12] = prior / budget.num_channels[group]
        return states, prior

    def desire(self, prior: Ints, actions: NDArray[np.floating]) -> Floats:
        """(B,) counts that actions in [-1, 1] ask for."""
        return prior.astype(np.float64) * np.exp(self.action_scale * actions.astype(np.float64))

    def decide(self, rates: ArrayLike, counts: Ints, step: int, desired: Floats) -> Ints:
        """(B, G) counts with the step's group decided: legal, and the rate still reachable."""
        counts, group = counts.copy(), self.groups[step]
        counts[:, group] = clamp(self.budget, counts, group, desired, self.budget.limit(rates))
        return counts

    def finish(self, rates: ArrayLike, counts: Ints, desired: Floats) -> Ints:
        """(B, G) counts with the rest spent in proportion to the desired counts (B, T)."""
        budget, wanted = self.budget, counts.astype(np.float64)
        wanted[:, self.groups] = desired
        wanted = np.clip(wanted, budget.min_counts, budget.num_channels)
        return grow(budget, counts, wanted, budget.limit(rates))

    def play(self, rates: ArrayLike, act: Act) -> Ints:
        """(B, G) keep counts of whole episodes with actions in [-1, 1]."""
        counts = self.start(rates)
        desired = np.empty((len(counts), self.num_steps))
        for step in range(self.num_steps):
            states, prior = self.observe(rates, counts, step)
            desired[:, step] = self.desire(prior, act(states, step))
            counts = self.decide(rates, counts, step, desired[:, step])
        return self.finish(rates, counts, desired)

    def replay(
        self, rates: ArrayLike, keep_counts: Ints | Sequence[Sequence[int]]
    ) -> tuple[Float32s, Float32s]:
        """States (B, T, F) and actions (B, T) of the episodes that end at these keep counts.

        An action outside [-1, 1] is clipped: only there would `play` end elsewhere.
        """
        keep_counts = np.asarray(keep_counts, dtype=np.int64)
        counts = self.start(rates)
        states = np.empty((len(counts), self.num_steps, NUM_FEATURES), dtype=np.float32)
        actions = np.empty(states.shape[:2])
        for step, group in enumerate(self.groups):
            states[:, step], prior = self.observe(rates, counts, step)
            actions[:, step] = np.log(keep_counts[:, group] / prior) / self.action_scale
            counts[:, group] = keep_counts[:, group]
        return states, np.clip(actions, -1, 1).astype(np.float32)


def _static_features(cost_model: CostModel, budget: Budget) -> NDArray[np.float64]:
    """(G, 8) position, n, c, k, w, h, stride and cost share, each divided by its largest value."""
    whole = np.tile(budget.num_channels, (len(cost_model.groups), 1))
    np.fill_diagonal(whole, budget.min_counts)
    read = attrgetter("num_channels", "in_channels", "kernel", "width", "height", "stride")
    shapes = [[step, *read(group)] for step, group in enumerate(cost_model.groups)]
    removable = budget.total - budget.cost(whole)
    static = np.column_stack([np.array(shapes, dtype=np.float64), removable])
    return static / np.maximum(static.max(axis=0), 1e-9)
