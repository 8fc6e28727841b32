"""The networks of the conditional DDPG agent: one actor and one critic for every rate."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn


class ActorCritic(TorchRLModule):
    """Deterministic actor a = tanh(f(s)) and critic Q(s, a); the rate is a feature of s.

    The last layer of the actor starts at zero, so that an untrained policy is the prior.
    `model_config`: `hidden`, widths of the hidden layers of both; `seed` of the initial weights.
    """

    def setup(self) -> None:
        """Builds the networks; the global random state is left as it was."""
        assert self.observation_space is not None
        assert self.action_space is not None
        (num_features,), (num_actions,) = self.observation_space.shape, self.action_space.shape  # type: ignore[misc]
        hidden = self.model_config["hidden"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model_config["seed"])
            self.actor = nn.Sequential(*_layers((num_features, *hidden, num_actions)), nn.Tanh())
            self.critic = nn.Sequential(*_layers((num_features + num_actions, *hidden, 1)))
        last = self.actor[-2]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        # A buffer, so that it travels with the weights and a restored learner keeps its rhythm.
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def values(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,) Q of states (N, F) and actions (N, A)."""
        return self.critic(torch.cat([states, actions], dim=1)).squeeze(1)

    def policy_values(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,) Q of the policy's own actions (N, A); its gradient reaches the actor only."""
        self.critic.requires_grad_(False)
        values = self.values(states, actions)
        self.critic.requires_grad_(True)
        return values

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"values": self.values(batch[Columns.OBS], batch[Columns.ACTIONS])}


def _layers(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.ReLU()]
    return layers[:-1]
