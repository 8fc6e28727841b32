"""The update rule: deterministic policy gradient on Monte-Carlo returns.

An episode is deterministic, undiscounted and rewarded once, at its end. So the return of every step
is the episode's reward and needs no bootstrapping and no target networks: ours; DDPG (Lillicrap et
al., 2016) and CACP bootstrap. The delayed actor is that of TD3 (Fujimoto et al., 2018).

The actor also imitates measured actions, the better their return the more, as in advantage-weighted
regression (Peng et al., 2019), beside the critic's gradient as in TD3+BC (Fujimoto and Gu, 2021).
Without it the actor follows the critic out of what was measured, saturates, and never comes back.
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
IMITATION_SHARPNESS = 2.0  # of exp(sharpness * normalised return)
MAX_RETURN = 3.0  # spreads above the mean: one lucky episode must not be all that is imitated


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
        """Weighted squared error of Q, plus, at every `actor_every`-th call, the actor's loss.

        On the other calls the actor has no gradient, so its optimizer leaves it alone.
        """
        module = self.module[module_id]
        assert isinstance(module, ActorCritic)
        errors = (fwd_out["values"] - batch[RETURNS]) ** 2  # (N,)
        loss = (batch[WEIGHTS] * errors).mean()
        self.metrics.log_value((module_id, "critic_loss"), loss.item(), window=1)
        module.num_updates += 1
        if module.num_updates % config.settings.actor_every == 0:
            actions = module.actor(batch[Columns.OBS])
            policy_value = module.policy_values(batch[Columns.OBS], actions).mean()
            self.metrics.log_value((module_id, "policy_value"), policy_value.item(), window=1)
            merit = (IMITATION_SHARPNESS * batch[RETURNS].clamp(max=MAX_RETURN)).exp()
            distance = ((actions - batch[Columns.ACTIONS]) ** 2).mean(dim=1)  # (N,)
            imitation = (merit / merit.mean() * distance).mean()
            loss = loss - policy_value + config.settings.imitation * imitation
        return loss
