"""The update rule: deterministic policy gradient on Monte-Carlo returns.

An episode is deterministic, undiscounted and rewarded once, at its end. So the return of every step
is the episode's reward and needs no bootstrapping and no target networks: ours; DDPG (Lillicrap et
al., 2016) and CACP bootstrap. The delayed actor is that of TD3 (Fujimoto et al., 2018).
"""

from typing import TYPE_CHECKING, Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from cacp_ray.agent.module import ActorCritic

if TYPE_CHECKING:
    from cacp_ray.agent.algorithm import CACPConfig

RETURNS = "returns"
WEIGHTS = "weights"


class CACPLearner(TorchLearner):
    """One optimizer for each network; one backward pass serves both losses."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for the critic and for the actor, each with its own step."""
        module = self.module[module_id]
        for name, rate in (
            ("critic", config.settings.critic_lr),
            ("actor", config.settings.actor_lr),
        ):
            params = list(getattr(module, name).parameters())
            self.register_optimizer(
                module_id=module_id,
                optimizer_name=name,
                optimizer=torch.optim.Adam(params),
                params=params,
                lr_or_lr_schedule=rate,
            )

    def compute_loss_for_module(
        self,
        *,
        module_id: str,
        config: "CACPConfig",
        batch: dict[str, Any],
        fwd_out: dict[str, Any],
    ) -> torch.Tensor:
        """Weighted squared error of Q, plus, at every `actor_every`-th call, minus Q of the policy.

        On the other calls the actor has no gradient, so its optimizer leaves it alone.
        """
        module = self.module[module_id]
        assert isinstance(module, ActorCritic)
        errors = (fwd_out["values"] - batch[RETURNS]) ** 2  # (N,)
        loss = (batch[WEIGHTS] * errors).mean()
        self.metrics.log_value((module_id, "critic_loss"), loss.item(), window=1)
        module.num_updates += 1
        if module.num_updates % config.settings.actor_every == 0:
            policy_value = module.policy_values(batch[Columns.OBS]).mean()
            self.metrics.log_value((module_id, "policy_value"), policy_value.item(), window=1)
            loss = loss - policy_value
        return loss
