"""The memory of the paper's agent: transitions of the last episodes, one memory for all rates.

Every step of an episode is rewarded r_T / T, its accuracy over its length (CACP), so that the
rewards of an episode add up to its accuracy. The published code, and AMC's, subtracts a moving
average of the sampled rewards; we subtract the mean of the memory, which that average follows. It
is one number for all rates and all steps: no order of policies changes, but the critic need not
first learn what every action earns. The memory holds 100 transitions a step of an episode: the last
100 episodes (AMC's code).
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from ray.rllib.core.columns import Columns

from cacp_ray.agent.parts import EpisodeArrays, draw_rows

CAPACITY = 100  # episodes

Targets = Literal["bootstrap", "monte_carlo"]


class Replay(EpisodeArrays):
    """The last episodes, all of length T.

    Attributes:
        states: (N, T, F).
        actions: (N, T).
        scores: (N,); NaN for a failed measurement.
    """

    capacity = CAPACITY

    def __init__(self, num_steps: int, num_features: int) -> None:
        super().__init__()
        self.states = np.empty((0, num_steps, num_features), np.float32)
        self.actions = np.empty((0, num_steps), np.float32)
        self.scores = np.empty(0, np.float32)

    def accuracies(self) -> NDArray[np.float32]:
        """(N,) in [0, 1], as the paper's rewards are; 0 for a failed measurement.

        Scores outside [0, 1] are scaled to it from the worst to the best of the memory (ours).
        """
        known = self.scores[np.isfinite(self.scores)]
        if len(known) and (known.min() < 0 or known.max() > 1):
            scaled = (self.scores - known.min()) / ((known.max() - known.min()) or 1.0)
        else:
            scaled = self.scores
        return np.nan_to_num(scaled, nan=0.0)

    def transitions(self, targets: Targets, has_baseline: bool) -> dict[str, NDArray[Any]]:
        """All N * T transitions, episode by episode, as the learner's columns.

        Args:
            targets: With `monte_carlo` every step is the last one and earns the rest of its
                episode: nothing is bootstrapped (ours).
            has_baseline: Whether the mean of the memory is subtracted from all accuracies.

        Returns:
            States (N * T, F), actions (N * T, 1), rewards (N * T,), next states (N * T, F), and 1
            where no step follows (N * T,).
        """
        num_steps, num_features = self.states.shape[1:]
        steps = np.tile(np.arange(num_steps), len(self))
        accuracies = self.accuracies()
        baseline = accuracies.mean() if has_baseline else 0.0
        rewards = np.repeat((accuracies - baseline) / num_steps, num_steps)
        is_last = steps == num_steps - 1
        if targets == "monte_carlo":
            rewards, is_last = rewards * (num_steps - steps), np.ones_like(is_last)
        following = np.concatenate([self.states[:, 1:], self.states[:, -1:]], axis=1)
        return {
            Columns.OBS: self.states.reshape(-1, num_features),
            Columns.ACTIONS: self.actions.reshape(-1, 1),
            Columns.REWARDS: rewards.astype(np.float32),
            Columns.NEXT_OBS: following.reshape(-1, num_features),
            Columns.TERMINATEDS: is_last.astype(np.float32),
        }

    def sample(
        self, count: int, targets: Targets, has_baseline: bool, rng: np.random.Generator
    ) -> dict[str, NDArray[Any]]:
        """Transitions drawn with replacement, float32."""
        return draw_rows(self.transitions(targets, has_baseline), count, rng)
