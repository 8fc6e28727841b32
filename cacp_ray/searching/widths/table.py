"""How each method that learns widths is made."""

from collections.abc import Callable

from torch import nn

from cacp_ray.errors import ConfigError
from cacp_ray.searching.widths import network_adjustment
from cacp_ray.searching.widths.chex import Chex
from cacp_ray.searching.widths.dmcp import DMCP
from cacp_ray.searching.widths.group_fisher import GroupFisher
from cacp_ray.searching.widths.method import ROUNDS, Method, WidthProblem, check_gated
from cacp_ray.searching.widths.network_adjustment import NetworkAdjustment
from cacp_ray.searching.widths.scp import SCP

MAKERS: dict[str, Callable[[WidthProblem, nn.Module], Method]] = {
    "chex": Chex,
    "dmcp": DMCP,
    "scp": SCP,
    "network_adjustment": NetworkAdjustment,
    "group_fisher": GroupFisher,
}
FOR_ALL_RATES = frozenset({"dmcp"})  # one training serves all rates of a run
# Steps in which each method can play its rounds or move its parameters from one end to the other.
FEWEST_STEPS = {
    "chex": ROUNDS,
    "dmcp": 100,
    "scp": 50,
    "network_adjustment": network_adjustment.ROUNDS + 1,
    "group_fisher": ROUNDS,
}


def make_method(name: str, problem: WidthProblem, model: nn.Module) -> Method:
    """A method that is ready to train the network, which gets gates.

    Raises:
        ConfigError: The training is too short for its schedule, or the method needs what the
            network or the cost does not have.
    """
    fewest = FEWEST_STEPS[name]
    if problem.steps < fewest:
        raise ConfigError(
            f"strategy {name} needs {fewest} steps of training, and widths.epochs has "
            f"{problem.steps}: raise it, or lower finetune.batch_size"
        )
    check_gated(name, problem)
    return MAKERS[name](problem, model)
