"""The update rule: deterministic policy gradient on whole allocations and Monte-Carlo returns.

An episode is deterministic and rewarded once, at its end. Its measurement is the target of the
critics, which needs no bootstrapping and no target networks. The critics judge the whole network,
and the actor gives all its actions at once (ours): DDPG (Lillicrap et al., 2016) and CACP learn Q
of one layer's action and bootstrap.

The actor's gradient is taken where the critics have data: at recorded episodes with the action of
one group replaced by the policy's, as MADDPG (Lowe et al., 2017) does for cooperating agents. All
groups pay alike for the replaced action: critics that do not know the budget would only ask for
more. The delayed actor is that of TD3 (Fujimoto et al., 2018).
"""

from typing import Any

import torch
from ray.rllib.core.columns import Columns
from ray.rllib.core.learner.torch.torch_learner import TorchLearner

from cacp_ray.agent.cacp.module import (
    LOG_RATIOS,
    REPLACED,
    SHARES,
    SPREADS,
    VALUES,
    WEIGHTS,
    ActorCritic,
)
from cacp_ray.agent.parts import register_adam

ACTOR_EVERY = 4  # critic steps to one actor step


class CACPLearner(TorchLearner):
    """One optimizer for the critics, one for the actor; one backward pass serves both losses."""

    def configure_optimizers_for_module(self, module_id: str, config: Any = None) -> None:
        """Adam for the critics and for the actor."""
        lr = config.settings.lr
        register_adam(self, module_id, {"critics": lr, "actor": lr})

    def compute_loss_for_module(
        self, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Any]
    ) -> torch.Tensor:
        """Weighted squared error of Q, plus, at every `ACTOR_EVERY`-th call, the actor's loss.

        On the other calls the actor has no gradient, so its optimizer leaves it alone.
        """
        module = self.module[module_id]
        assert isinstance(module, ActorCritic)
        recorded, rates = batch[Columns.ACTIONS], batch[Columns.OBS]
        errors = batch[WEIGHTS] * (fwd_out[VALUES] - batch[VALUES]) ** 2  # (E, N)
        # Every critic learns from its own rows, so that they differ where data are few.
        owner = torch.arange(errors.shape[1]) % errors.shape[0]
        loss = errors.gather(0, owner[None]).mean() * errors.shape[0]
        self.metrics.log_value((module_id, "critic_loss"), errors.mean().item(), window=1)
        module.num_updates += 1
        if module.num_updates % ACTOR_EVERY == 0:
            actions = module.actor(rates)  # (N, P)
            group = batch[REPLACED][:, None]
            step = config.settings.action_scale * (actions - recorded).gather(1, group)  # (N, 1)
            # All groups give alike for what one takes, so that the cost stays as it was.
            moved = (batch[LOG_RATIOS] - step * batch[SHARES].gather(1, group)).scatter_add(
                1, group, step
            )
            value = (module.policy_values(moved) / batch[SPREADS]).mean()
            self.metrics.log_value((module_id, "policy_value"), value.item(), window=1)
            loss = loss - actions.shape[1] * value
        return loss
