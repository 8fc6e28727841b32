"""Settings of the agent; no heavy import here, so that reading a configuration stays fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import ConfigDict


@dataclass(frozen=True)
class AgentSettings:
    """The conditional DDPG agent. Defaults are ours; the paper's are named where they differ.

    Attributes:
        hidden: Widths of the hidden layers of actor and critic (published code: 300, 300).
        actor_lr: Adam's step of the actor (paper: 1e-4).
        critic_lr: Adam's step of the critic (paper: 1e-3).
        batch_size: Transitions a gradient step.
        updates_per_episode: Critic steps for each told episode.
        actor_every: Critic steps to one actor step (delayed actor as in TD3).
        imitation: Weight of the measured actions in the actor's loss, the better the more; 0 leaves
            the critic alone to lead it.
        noise: Standard deviation of the action noise at a rate's first episode.
        noise_decay: Factor on the noise after every episode of the same rate.
        noise_floor: Smallest noise.
        action_scale: s in keep ratio = prior * exp(s * a), a in [-1, 1].
        elite_share: Share of episodes that mutate a good earlier allocation instead of the policy.
        elite_size: Best distinct allocations kept a rate.
        warmup: Episodes a rate of noise around the prior before the actor is used.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    hidden: Annotated[tuple[Annotated[int, Ge(1)], ...], MinLen(1)] = (64, 64)
    actor_lr: Annotated[float, Gt(0)] = 1e-3
    critic_lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Annotated[int, Ge(1)] = 128
    updates_per_episode: Annotated[int, Ge(0)] = 16
    actor_every: Annotated[int, Ge(1)] = 4
    imitation: Annotated[float, Ge(0)] = 5.0
    noise: Annotated[float, Ge(0)] = 0.45
    noise_decay: Annotated[float, Gt(0), Le(1)] = 0.98
    noise_floor: Annotated[float, Ge(0)] = 0.05
    action_scale: Annotated[float, Gt(0)] = 0.8
    elite_share: Annotated[float, Ge(0), Le(1)] = 0.6
    elite_size: Annotated[int, Ge(1)] = 5
    warmup: Annotated[int, Ge(0)] = 5


Mode = Literal["rounds", "async"]
