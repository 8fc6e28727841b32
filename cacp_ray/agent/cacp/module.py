"""The networks of the conditional agent: one actor and a few critics for every rate."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

LOG_RATIOS = "log_ratios"
# Brings log keep ratios of the usual rates to about one around zero.
INPUT_CENTRE = -0.5
INPUT_SCALE = 3.0


class ActorCritic(TorchRLModule):
    """Actor a = tanh(f(rate)), one action a group; critics Q(log keep ratios) of the network.

    Observation (1,): the rate. Action (P,): offsets from the prior (searching/allocation.py).
    The critics do not see the rate: how good a network is does not depend on what was asked for,
    so that measurements at one rate teach them about all others.
    The last layer of the actor starts at zero, so that an untrained policy is the prior.
    `model_config`: `hidden`, widths of the hidden layers of all; `num_critics`; `seed`.
    """

    def setup(self) -> None:
        """Builds the networks; the global random state is left as it was."""
        assert self.observation_space is not None
        assert self.action_space is not None
        (num_features,), (num_actions,) = self.observation_space.shape, self.action_space.shape  # type: ignore[misc]
        hidden = self.model_config["hidden"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model_config["seed"])
            self.actor = nn.Sequential(
                *make_layers((num_features, *hidden, num_actions)), nn.Tanh()
            )
            self.critics = nn.ModuleList(
                nn.Sequential(*make_layers((num_actions, *hidden, 1)))
                for _ in range(self.model_config["num_critics"])
            )
        last = self.actor[-2]
        nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        # A buffer, so that it travels with the weights and a restored learner keeps its rhythm.
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def values(self, log_ratios: Tensor) -> Tensor:
        """(E, N) Q of every critic at log keep ratios (N, P)."""
        features = INPUT_SCALE * (log_ratios - INPUT_CENTRE)
        return torch.stack([critic(features).squeeze(1) for critic in self.critics])

    def policy_values(self, log_ratios: Tensor) -> Tensor:
        """(E, N) the same for the policy's networks; the gradient reaches the actor only."""
        self.critics.requires_grad_(False)
        values = self.values(log_ratios)
        self.critics.requires_grad_(True)
        return values

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {"values": self.values(batch[LOG_RATIOS])}


def make_layers(widths: Sequence[int]) -> list[nn.Module]:
    """Linear layers with SiLU in between."""
    layers: list[nn.Module] = []
    for num_in, num_out in pairwise(widths):
        layers += [nn.Linear(num_in, num_out), nn.SiLU()]
    return layers[:-1]
