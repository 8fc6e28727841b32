"""The channel allocation MDP as an ordinary Gymnasium environment, for agents of any library.

One group a step, one candidate an episode; the arithmetic is that of mdp.py. Importing this module
registers it: `gymnasium.make("cacp_ray/ChannelAllocation-v0", mdp=..., rates=..., score=...)`.
With the prefix `cacp_ray.searching.env:` Gymnasium imports it first, in worker processes too.
docs/environment.md shows it on a real network.
"""

from collections.abc import Callable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from cacp_ray.errors import ConfigError
from cacp_ray.searching.mdp import AllocationMDP, Float32s

ENV_ID = "cacp_ray/ChannelAllocation-v0"


class ChannelAllocationEnv(gym.Env[Float32s, NDArray[np.floating]]):
    """Observation (F,) in [0, 1]; action (1,) in [-1, 1], 0 being the prior.

    The reward is the score of the keep counts at the last step and 0 before. An episode has one
    step for every group that may be cut and is never truncated. `info` holds the `rate`, and at the
    last step the `keep_counts` of all groups, within its budget, and their `cost_kept`. Each
    environment scores the same keep counts once.
    """

    def __init__(
        self, mdp: AllocationMDP, rates: Sequence[float], score: Callable[[tuple[int, ...]], float]
    ) -> None:
        """Defines the spaces.

        Args:
            mdp: Arithmetic of an episode.
            rates: Shares of the cost kept; `reset` draws one, or takes `options["rate"]`.
            score: Keep counts -> accuracy, the same for the same keep counts.

        Raises:
            ConfigError: There are no rates.
            InfeasibleRateError: A rate cannot be reached.
        """
        if not rates:
            raise ConfigError("the environment has no rates: give at least one in (0, 1]")
        for rate in rates:
            mdp.budget.check(rate)
        self.observation_space = gym.spaces.Box(0.0, 1.0, (mdp.state_size,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._mdp = mdp
        self._rates = tuple(rates)
        self._score = score
        self._known: dict[tuple[int, ...], float] = {}
        self._step = mdp.num_steps

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Float32s, dict[str, Any]]:
        """Starts an episode.

        Args:
            seed: Seed of the rates drawn from now on.
            options: `rate`: any reachable rate, in the set or not.

        Raises:
            InfeasibleRateError: The rate in `options` cannot be reached.
        """
        super().reset(seed=seed)
        rate = (options or {}).get("rate")
        if rate is None:
            rate = self._rates[int(self.np_random.integers(len(self._rates)))]
        self._mdp.budget.check(rate)
        self._rate = np.array([rate])
        self._step = 0
        self._counts = self._mdp.start(self._rate)
        self._desired = np.empty((1, self._mdp.num_steps))
        return self._observe(), {"rate": float(rate)}

    def step(
        self, action: NDArray[np.floating]
    ) -> tuple[Float32s, float, bool, bool, dict[str, Any]]:
        """Decides one group; the last step spends the rest of the budget and scores.

        Args:
            action: (1,); values beyond [-1, 1] are clipped.

        Raises:
            ResetNeeded: The episode has ended, or none has begun.
            InvalidAction: The action is not a finite number.
        """
        mdp, step = self._mdp, self._step
        if step == mdp.num_steps:
            raise gym.error.ResetNeeded("no episode is under way: call reset() before step()")
        if not np.isfinite(action).all():
            raise gym.error.InvalidAction(f"action {action}: give a finite number in [-1, 1]")
        action = np.clip(np.asarray(action).reshape(1), -1, 1)
        self._desired[:, step] = mdp.desire(self._prior, action)
        self._counts = mdp.decide(self._rate, self._counts, step, self._desired[:, step])
        info: dict[str, Any] = {"rate": float(self._rate[0])}
        self._step += 1
        if self._step < mdp.num_steps:
            return self._observe(), 0.0, False, False, info
        self._counts = mdp.finish(self._rate, self._counts, self._desired)
        counts = tuple(int(count) for count in self._counts[0])
        if counts not in self._known:
            self._known[counts] = float(self._score(counts))
        info["keep_counts"] = counts
        info["cost_kept"] = float(mdp.budget.cost(self._counts)[0] / mdp.budget.total)
        return self._state, self._known[counts], True, False, info

    def _observe(self) -> Float32s:
        states, self._prior = self._mdp.observe(self._rate, self._counts, self._step)
        self._state = np.clip(states[0], 0, 1)
        return self._state


gym.register(  # pyright: ignore[reportUnknownMemberType]
    id=ENV_ID, entry_point="cacp_ray.searching.env:ChannelAllocationEnv"
)
