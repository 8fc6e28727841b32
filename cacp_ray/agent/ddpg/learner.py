"""The update rule of the paper's agent: DDPG (Lillicrap et al., 2016), or TD3 (Fujimoto, 2018).

    y = r_T / T + Q'(s', mu'(s')),   and y = r_T / T at the last step (discount 1)
    critic: mean of (Q(s, a) - y)^2;   actor: -mean of Q(s, mu(s));   targets: Polyak step

Both losses use the networks before the step; the published code moves the critic first. A baseline
may be subtracted from r_T (replay.py).
"""

from collections.abc import Mapping
from typing import Any

import torch
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from cacp_ray.agent.ddpg.module import SMOOTHING, VALUES, SequentialActorCritic
from cacp_ray.agent.shell import AgentConfig
from cacp_ray.searching.settings import PaperSettings

TD3_ACTOR_EVERY = 2  # critic steps to one step of the actor and of the targets


class DDPGLearner(TorchLearner):
    """One optimizer for the critic, or both critics, one for the actor; one backward pass."""

    config: AgentConfig[PaperSettings]

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for the critics and for the actor; none for the target networks."""
        settings = config.settings
        rates = {"critics": settings.critic_lr, "actor": settings.actor_lr}
        register_adam(self, module_id, rates)

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """Squared error of every Q, plus the actor's loss where it is its turn."""
        module = self.module[module_id]
        assert isinstance(module, SequentialActorCritic)
        later = module.next_value(batch[Columns.NEXT_OBS], batch[SMOOTHING])
        targets = batch[Columns.REWARDS] + (1 - batch[Columns.TERMINATEDS]) * later  # (N,)
        loss = ((fwd_out[VALUES] - targets) ** 2).mean(dim=1).sum()
        self.metrics.log_value((module_id, "critic_loss"), loss.item(), window=1)
        module.num_updates += 1
        if self._is_actors_turn(module):
            value = module.policy_value(batch[Columns.OBS]).mean()
            self.metrics.log_value((module_id, "policy_value"), value.item(), window=1)
            loss = loss - value
        return loss

    def apply_gradients(self, gradients_dict: Any) -> None:
        """Steps the optimizers, then the target networks."""
        super().apply_gradients(gradients_dict)
        module = self.module[DEFAULT_MODULE_ID]
        assert isinstance(module, SequentialActorCritic)
        if self._is_actors_turn(module):
            module.follow(self.config.settings.tau)

    def _is_actors_turn(self, module: SequentialActorCritic) -> bool:
        is_td3 = len(module.critics) > 1
        return not is_td3 or int(module.num_updates) % TD3_ACTOR_EVERY == 0


def register_adam(learner: TorchLearner, module_id: str, rates: Mapping[str, float]) -> None:
    """Gives each named network of a learner's module an Adam optimizer with its learning rate."""
    for name, rate in rates.items():
        params = list(getattr(learner.module[module_id], name).parameters())
        learner.register_optimizer(
            module_id=module_id,
            optimizer_name=name,
            optimizer=torch.optim.Adam(params),
            params=params,
            lr_or_lr_schedule=rate,
        )
