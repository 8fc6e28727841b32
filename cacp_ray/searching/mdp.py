"""Channel allocation as a Markov decision process: one group a step, many candidates at once.

The prior is the uniform allocation of a rate. At every step the budget not yet spent is shared over
the groups still to come, in proportion to it, and a zero action keeps that share: zero actions give
the prior itself, and one bold step does not starve the groups after it. An action a in [-1, 1]
keeps exp(s * a) times as many channels, the budget clamps it, and what is left after the last group
is spent. So no episode ends above its budget and none below it needlessly.
`rollout`, `replay` and the Gymnasium environment (env.py) share the same steps.

The first 12 state features are those of CACP (2021, Table D); the prior keep ratio, its re-solving
at every step and the final spending are ours.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.pruning.cost import CostModel
from cacp_ray.searching.budget import Budget, Floats, Ints, clamp, grow, share_out, uniform

Float32s = NDArray[np.float32]
Act = Callable[[Float32s, int], NDArray[np.floating]]

NUM_FEATURES = 13


@dataclass(frozen=True)
class Rollout:
    """Whole episodes.

    Attributes:
        keep_counts: int (B, G), within budget and spent.
        states: (B, G, F) seen on the way to these keep counts.
        actions: (B, G) in [-1, 1] that lead there.
    """

    keep_counts: Ints
    states: Float32s
    actions: Float32s


class AllocationMDP:
    """The arithmetic of an episode, vectorised over B episodes."""

    state_size = NUM_FEATURES

    def __init__(
        self, cost_model: CostModel, budget: Budget, prior_weights: ArrayLike, action_scale: float
    ) -> None:
        """Prepares the static features.

        Args:
            cost_model: Shapes of the groups.
            budget: The budget; its cost is what rates limit.
            prior_weights: (G,) 1 for groups that share the cut in the prior, 0 for whole ones.
            action_scale: s in keep count = prior * exp(s * a).
        """
        self.budget = budget
        self.num_steps = len(cost_model.groups)
        self.action_scale = action_scale
        self._weights = np.asarray(prior_weights, dtype=bool)
        self._static = _static_features(cost_model, budget)  # (G, 8)
        self._priors: dict[float, Ints] = {}

    def prior(self, rates: ArrayLike) -> Ints:
        """(B, G) keep counts of the prior, which are those of zero actions."""
        wanted = [float(rate) for rate in np.asarray(rates, dtype=np.float64)]
        new = sorted(set(wanted) - self._priors.keys())
        if new:
            self._priors.update(zip(new, uniform(self.budget, new, self._weights), strict=True))
        return np.stack([self._priors[rate] for rate in wanted])

    def start(self, rates: ArrayLike) -> Ints:
        """(B, G) counts before the first step: every group at its smallest."""
        return np.tile(self.budget.min_counts, (len(np.asarray(rates)), 1))

    def observe(self, rates: ArrayLike, counts: Ints, step: int) -> tuple[Float32s, Ints]:
        """States (B, F), about within [0, 1], and counts (B,) of group `step` at zero action.

        Args:
            rates: (B,) share of the cost kept.
            counts: (B, G) with the groups from `step` on at their smallest counts.
            step: The group to decide.
        """
        budget, total = self.budget, self.budget.total
        rates = np.asarray(rates, dtype=np.float64)
        base, limit = self.prior(rates), budget.limit(rates)
        prior = share_out(budget, counts, step, base, self._weights, limit)[:, step]
        whole = counts.copy()
        whole[:, step:] = budget.num_channels[step:]
        most, least = budget.cost(whole), budget.cost(counts)
        previous = counts[:, step - 1] / budget.num_channels[step - 1] if step else 1.0
        states = np.empty((len(rates), NUM_FEATURES), dtype=np.float32)
        states[:, :8] = self._static[step]
        states[:, 8] = rates
        states[:, 9] = 1 - most / total  # Reduced
        states[:, 10] = (most - least) / total  # Rest: what can still go
        states[:, 11] = previous
        states[:, 12] = prior / budget.num_channels[step]
        return states, prior

    def desire(self, prior: Ints, actions: NDArray[np.floating]) -> Floats:
        """(B,) counts that actions in [-1, 1] ask for."""
        return prior.astype(np.float64) * np.exp(self.action_scale * actions.astype(np.float64))

    def decide(self, rates: ArrayLike, counts: Ints, step: int, desired: Floats) -> Ints:
        """(B, G) counts with group `step` decided: legal, and the rate still reachable."""
        counts = counts.copy()
        counts[:, step] = clamp(self.budget, counts, step, desired, self.budget.limit(rates))
        return counts

    def finish(self, rates: ArrayLike, counts: Ints, desired: Floats) -> Ints:
        """(B, G) counts with the rest of the budget spent in proportion to what was desired."""
        wanted = np.clip(desired, self.budget.min_counts, self.budget.num_channels)
        return grow(self.budget, counts, wanted, self.budget.limit(rates))

    def rollout(self, rates: ArrayLike, act: Act) -> Rollout:
        """Plays whole episodes, and tells how their final keep counts are reached."""
        counts = self.play(rates, act)
        return Rollout(counts, *self.replay(rates, counts))

    def play(self, rates: ArrayLike, act: Act) -> Ints:
        """(B, G) keep counts of whole episodes.

        Args:
            rates: (B,) share of the cost kept, each reachable.
            act: States (B, F) and step -> actions (B,) in [-1, 1].
        """
        counts = self.start(rates)
        desired = np.empty(counts.shape)
        for step in range(self.num_steps):
            states, prior = self.observe(rates, counts, step)
            desired[:, step] = self.desire(prior, act(states, step))
            counts = self.decide(rates, counts, step, desired[:, step])
        return self.finish(rates, counts, desired)

    def replay(
        self, rates: ArrayLike, keep_counts: Ints | Sequence[Sequence[int]]
    ) -> tuple[Float32s, Float32s]:
        """States (B, G, F) and actions (B, G) of the episodes that end at these keep counts.

        An action outside [-1, 1] is clipped: only there would a rollout end elsewhere.
        """
        keep_counts = np.asarray(keep_counts, dtype=np.int64)
        counts = self.start(rates)
        states = np.empty((*counts.shape, NUM_FEATURES), dtype=np.float32)
        actions = np.empty(counts.shape)
        for step in range(self.num_steps):
            states[:, step], prior = self.observe(rates, counts, step)
            actions[:, step] = np.log(keep_counts[:, step] / prior) / self.action_scale
            counts[:, step] = keep_counts[:, step]
        return states, np.clip(actions, -1, 1).astype(np.float32)


def _static_features(cost_model: CostModel, budget: Budget) -> NDArray[np.float64]:
    """(G, 8) position, n, c, k, w, h, stride and cost share, each divided by its largest value."""
    whole = np.tile(budget.num_channels, (len(cost_model.groups), 1))
    np.fill_diagonal(whole, budget.min_counts)
    columns = [
        [
            step,
            group.num_channels,
            group.in_channels,
            group.kernel,
            group.width,
            group.height,
            group.stride,
        ]
        for step, group in enumerate(cost_model.groups)
    ]
    removable = budget.total - budget.cost(whole)
    static = np.column_stack([np.array(columns, dtype=np.float64), removable])
    return static / np.maximum(static.max(axis=0), 1e-9)
