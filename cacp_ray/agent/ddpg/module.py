"""The networks of the paper's agent: an actor, its critic, and the slow copies of both."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from torch import Tensor, nn

from cacp_ray.agent.parts import frozen, make_layers

SMOOTHING = "smoothing"  # column of a batch, next to RLlib's own
VALUES = "values"


class Critic(nn.Module):
    """Q(s, a); the action has a first layer of its own, added to that of the state (AMC's code).

    In a joint layer, the weights of the action would start several times smaller.
    """

    def __init__(self, num_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.state = nn.Linear(num_features, hidden[0])
        self.action = nn.Linear(1, hidden[0])
        self.rest = nn.Sequential(nn.ReLU(), *make_layers((*hidden, 1), nn.ReLU))

    def forward(self, states: Tensor, actions: Tensor) -> Tensor:
        """(N,) values of states (N, F) and actions (N, 1)."""
        return self.rest(self.state(states) + self.action(actions)).squeeze(1)


class SequentialActorCritic(TorchRLModule):
    """Actor a = mu(s) and critics Q(s, a) of one step; one network for all groups and rates.

    Observation (F,): a state of the MDP, the rate among its features. Action (1,): the keep ratio
    in (0, 1) (sigmoid), or in [-1, 1] around the prior (tanh, last layer zero: 0 is the prior).
    Three fully connected layers with ReLU in each network (CACP; widths: AMC's code).
    Checkpoints hold the target networks too, but no optimizer trains them.
    `model_config`: `hidden`, widths of the hidden layers; `num_critics`; `prior`; `seed`.
    """

    def setup(self) -> None:
        """Builds the networks; the global random state stays as it was."""
        assert self.observation_space is not None
        (num_features,) = self.observation_space.shape  # type: ignore[misc]
        hidden, has_prior = self.model_config["hidden"], self.model_config["prior"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.model_config["seed"])
            layers = make_layers((num_features, *hidden, 1), nn.ReLU, is_last_zero=has_prior)
            self.actor = nn.Sequential(*layers, nn.Tanh() if has_prior else nn.Sigmoid())
            self.critics = nn.ModuleList(
                Critic(num_features, hidden) for _ in range(self.model_config["num_critics"])
            )
        self.target_actor = deepcopy(self.actor).requires_grad_(False)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        # A buffer travels with the weights, so a restored learner keeps its rhythm.
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))

    def policy_value(self, states: Tensor) -> Tensor:
        """(N,) Q(s, mu(s)) of the first critic; its gradient reaches the actor only."""
        with frozen(self.critics):
            return self.critics[0](states, self.actor(states))

    @torch.no_grad()
    def next_value(self, states: Tensor, noise: Tensor) -> Tensor:
        """(N,) least Q'(s', mu'(s') + noise) of the target critics at next states (N, F).

        The noise (N, 1), 0 in plain DDPG, leaves the target action in its range.
        """
        low = -1.0 if self.model_config["prior"] else 0.0
        actions = (self.target_actor(states) + noise).clamp(low, 1)
        return _judge(self.target_critics, states, actions).min(dim=0).values

    @torch.no_grad()
    def follow(self, tau: float) -> None:
        """Polyak step: target = (1 - tau) * target + tau * trained."""
        pairs = ((self.target_actor, self.actor), (self.target_critics, self.critics))
        for target, trained in pairs:
            for slow, fast in zip(target.parameters(), trained.parameters(), strict=True):
                slow.lerp_(fast, tau)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Columns.ACTIONS: self.actor(batch[Columns.OBS])}

    def _forward_train(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {VALUES: _judge(self.critics, batch[Columns.OBS], batch[Columns.ACTIONS])}


def _judge(critics: nn.ModuleList, states: Tensor, actions: Tensor) -> Tensor:
    """(E, N) Q of every critic at states (N, F) and actions (N, 1)."""
    return torch.stack([critic(states, actions) for critic in critics])
