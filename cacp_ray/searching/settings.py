"""Settings of the agents; this module imports little, so that reading a configuration is fast."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MaxLen, MinLen
from pydantic import ConfigDict

# Above these, networks and batches of an agent would fill the memory.
MAX_WIDTH = 4096
MAX_BATCH = 65_536
Widths = Annotated[tuple[Annotated[int, Ge(1), Le(MAX_WIDTH)], ...], MinLen(1), MaxLen(8)]


@dataclass(frozen=True)
class AgentSettings:
    """The conditional agent (agent/cacp); all defaults are ours.

    Attributes:
        hidden: Widths of the hidden layers of the critics.
        lr: Adam's step.
        batch_size: Episodes a gradient step, for each critic.
        updates_per_episode: Critic steps for each told episode; 0 switches learning and the choice
            among drafts off.
        noise: Standard deviation of the drafts' noise at a rate's first episode.
        noise_decay: Factor on the noise after every episode of the same rate.
        action_scale: s in keep count = prior * exp(s * a), a in [-1, 1].
        elite_share: Share of drafts that change a good earlier allocation in some groups; the
            others are the mean of good allocations with noise in all.
        drafts: Drafts for every candidate; the critics choose one.
        warmup: Episodes of noise around the prior, at each rate, before the critics are used.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    hidden: Widths = (
        64,
        64,
    )
    lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Annotated[int, Ge(1), Le(MAX_BATCH)] = 128
    updates_per_episode: Annotated[int, Ge(0), Le(MAX_BATCH)] = 16
    noise: Annotated[float, Ge(0)] = 0.45
    noise_decay: Annotated[float, Gt(0), Le(1)] = 0.99
    action_scale: Annotated[float, Gt(0)] = 0.8
    elite_share: Annotated[float, Ge(0), Le(1)] = 0.6
    drafts: Annotated[int, Ge(1), Le(MAX_BATCH)] = 32
    warmup: Annotated[int, Ge(0)] = 5


@dataclass(frozen=True)
class PaperSettings:
    """The agent of CACP (2021), and of AMC (2018) for one rate (agent/ddpg).

    The form is CACP's. Numbers that its paper leaves open are those of AMC's published code, on
    which the authors' own code builds.

    Attributes:
        hidden: Widths of the hidden layers of actor and critic; three layers are the paper's, the
            widths AMC's code.
        actor_lr: Adam's step of the actor (AMC's code).
        critic_lr: Adam's step of the critic (AMC's code).
        batch_size: Transitions a gradient step (AMC's code).
        tau: Share of the trained networks that the target networks take on a step (AMC's code).
        noise: Standard deviation of the action noise after the warm-up (AMC's code).
        noise_decay: Factor on the noise after every episode where 500 follow the warm-up, as in the
            paper; stretched for other numbers (ours).
        warmup_share: Share of the evaluations that are random: 300 of 800 in the paper.
        baseline: Subtracts the mean accuracy of the memory, of all rates alike, from the rewards
            (AMC's code, and CACP's).
        prior: Actions around the prior of `cacp`, and the budget spent: a control (ours).
        targets: `bootstrap` from the next step, or `monte_carlo`: the real reward of the rest of
            the episode (ours).
        twin: TD3 (Fujimoto et al., 2018): the smaller of two critics, smoothed target actions, and
            an actor that moves on every other step.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    hidden: Widths = (
        300,
        300,
    )
    actor_lr: Annotated[float, Gt(0)] = 1e-4
    critic_lr: Annotated[float, Gt(0)] = 1e-3
    batch_size: Annotated[int, Ge(1), Le(MAX_BATCH)] = 64
    tau: Annotated[float, Gt(0), Le(1)] = 0.01
    noise: Annotated[float, Ge(0)] = 0.5
    noise_decay: Annotated[float, Gt(0), Le(1)] = 0.95
    warmup_share: Annotated[float, Ge(0), Le(1)] = 0.375
    baseline: bool = True
    prior: bool = False
    targets: Literal["bootstrap", "monte_carlo"] = "bootstrap"
    twin: bool = False


Mode = Literal["rounds", "async"]
