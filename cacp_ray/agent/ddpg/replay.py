"""The memory of the paper's agent: transitions of the last episodes, one memory for all rates.

Every step of an episode is rewarded r_T / T, its accuracy over its length (CACP), so that the
rewards of an episode add up to its accuracy. The published code, and AMC's, subtracts a moving
average of the sampled rewards; here the mean of those in memory, which that average follows. It is
one number for all rates and all steps: no order of policies changes, but the critic need not first
learn what every action earns. Capacity: 100 transitions a step of an episode, so the last 100
episodes (AMC's code).
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from cacp_ray.searching.mdp import Float32s

CAPACITY = 100  # episodes

Targets = Literal["bootstrap", "monte_carlo"]


class Replay:
    """Episodes of equal length T; older ones give way."""

    def __init__(self, num_steps: int, num_features: int) -> None:
        self.states = np.empty((0, num_steps, num_features), np.float32)
        self.actions = np.empty((0, num_steps), np.float32)
        self.accuracies = np.empty(0, np.float32)
        self.num_added = 0

    def __len__(self) -> int:
        return len(self.accuracies)

    def add(self, states: Float32s, actions: Float32s, accuracies: ArrayLike) -> None:
        """Adds N episodes.

        Args:
            states: (N, T, F).
            actions: (N, T).
            accuracies: (N,) in [0, 1]; 0 for a failed measurement.
        """
        accuracies = np.asarray(accuracies, np.float32)
        self.states = np.concatenate([self.states, states])[-CAPACITY:]
        self.actions = np.concatenate([self.actions, actions])[-CAPACITY:]
        self.accuracies = np.concatenate([self.accuracies, accuracies])[-CAPACITY:]
        self.num_added += len(accuracies)

    def transitions(self, targets: Targets, has_baseline: bool) -> dict[str, NDArray[Any]]:
        """All E * T transitions, episode by episode.

        Args:
            has_baseline: Subtracts the mean accuracy of the memory before it is shared out.
            targets: With `monte_carlo` every step is the last one and earns the rest of its
                episode: nothing is bootstrapped (ours).

        Returns:
            `states` (N, F), `actions` (N, 1), `rewards` (N,), `next_states` (N, F), `is_last` (N,)
            1 where no step follows.
        """
        num_steps, num_features = self.states.shape[1:]
        steps = np.tile(np.arange(num_steps), len(self))
        baseline = self.accuracies.mean() if has_baseline else 0.0
        rewards = np.repeat((self.accuracies - baseline) / num_steps, num_steps)
        is_last = steps == num_steps - 1
        if targets == "monte_carlo":
            rewards, is_last = rewards * (num_steps - steps), np.ones_like(is_last)
        following = np.concatenate([self.states[:, 1:], self.states[:, -1:]], axis=1)
        return {
            "states": self.states.reshape(-1, num_features),
            "actions": self.actions.reshape(-1, 1),
            "rewards": rewards.astype(np.float32),
            "next_states": following.reshape(-1, num_features),
            "is_last": is_last.astype(np.float32),
        }

    def sample(
        self, count: int, targets: Targets, has_baseline: bool, rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """Transitions drawn with replacement, every one as likely."""
        rows = rng.integers(len(self) * self.states.shape[1], size=count)
        columns = self.transitions(targets, has_baseline)
        return {name: column[rows] for name, column in columns.items()}

    def get_state(self) -> dict[str, Any]:
        """All arrays, and the count."""
        return dict(vars(self))

    def set_state(self, state: dict[str, Any]) -> None:
        """Takes what `get_state` gave."""
        vars(self).update(state)
