"""The networks of the conditional agent: one actor and a few critics for every rate."""

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from cacp_ray.agent.parts import frozen, make_layers

# Columns of a batch, next to RLlib's own.
LOG_RATIOS = "log_ratios"
VALUES = "values"
SPREADS = "spreads"
SHARES = "shares"
WEIGHTS = "weights"
REPLACED = "replaced"
# These bring log keep ratios of the usual rates to about one around zero.
INPUT_CENTRE = -0.5
INPUT_SCALE = 3.0


class ActorCritic(TorchRLModule):
    """Actor a = tanh(f(rate)), one action a group; critics Q(log keep ratios) of the network.

    Observation (1,): the rate. Action (P,): offsets from the prior (searching/allocation.py).
    The critics do not see the rate: how good a network is does not depend on the rate asked for,
    so measurements at one rate teach them about all others.
    The last layer of the actor starts at zero, so an untrained policy is the prior.
    `model_config`: `hidden`, widths of the hidden layers of all; `num_critics`; `seed`.
    """

    def setup(self) -> None:
        """Builds the networks; the global random state stays as it was."""
        assert self.observation_space is not None
        assert self.action_space is not None
        (num_features,), (num_actions,) = self.observation_space.shape, self.action_space.shape  # type: ignore[misc]
        hidden = self.model_config["hidden"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model_config["seed"])
            widths = (num_features, *hidden, num_actions)
            self.actor = nn.Sequential(*make_layers(widths, nn.SiLU, is_last_zero=True), nn.Tanh())
            self.critics = nn.ModuleList(
                nn.Sequential(*make_layers((num_actions, *hidden, 1), nn.SiLU))
                for _ in range(self.model_config["num_critics"])
            )
        # A buffer travels with the weights, so a restored learner keeps its rhythm.
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def values(self, log_ratios: Tensor) -> Tensor:
        """(E, N) Q of every critic at log keep ratios (N, P)."""
        features = INPUT_SCALE * (log_ratios - INPUT_CENTRE)
        return torch.stack([critic(features).squeeze(1) for critic in self.critics])

    def policy_values(self, log_ratios: Tensor) -> Tensor:
        """(E, N) the same for the policy's networks; the gradient reaches the actor only."""
        with frozen(self.critics):
            return self.values(log_ratios)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {VALUES: self.values(batch[LOG_RATIOS])}
