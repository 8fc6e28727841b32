"""The critics: a few small networks that value allocations, and how they learn.

They do not see the rate: how good a network is does not depend on the rate asked for, so
measurements at one rate teach them about all others. There is no bootstrapping: an episode ends
with its only reward, and Q is that value.
"""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim.adam import adam

from cacp_ray.agent.cacp.replay import LOG_RATIOS, VALUES, WEIGHTS
from cacp_ray.agent.parts import make_layers

NUM_CRITICS = 3
BETAS, EPSILON = (0.9, 0.999), 1e-8
# These bring log keep ratios of the usual rates to about one around zero.
INPUT_CENTRE = -0.5
INPUT_SCALE = 3.0


class Critics(nn.Module):
    """Q(log keep ratios) of the critics, and Adam for them (Kingma and Ba, 2015)."""

    def __init__(self, num_groups: int, hidden: tuple[int, ...], lr: float, seed: int) -> None:
        """Fresh networks; the global random state stays as it was."""
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.networks = nn.ModuleList(
                nn.Sequential(*make_layers((num_groups, *hidden, 1), nn.SiLU))
                for _ in range(NUM_CRITICS)
            )
        self._lr = lr
        self._first = [torch.zeros_like(weight) for weight in self.parameters()]
        self._second = [torch.zeros_like(weight) for weight in self.parameters()]
        self._steps = [torch.zeros(()) for _ in self.parameters()]

    def values(self, log_ratios: Tensor) -> Tensor:
        """(E, N) Q of every critic at log keep ratios (N, P)."""
        features = INPUT_SCALE * (log_ratios - INPUT_CENTRE)
        return torch.stack([critic(features).squeeze(1) for critic in self.networks])

    def step(self, batch: Mapping[str, NDArray[np.float32]]) -> float:
        """One gradient step on rows of the replay, N for each critic; returns the squared error."""
        rows = {name: torch.from_numpy(column) for name, column in batch.items()}
        errors = rows[WEIGHTS] * (self.values(rows[LOG_RATIOS]) - rows[VALUES]) ** 2  # (E, N)
        # Every critic learns from its own rows, so that they differ where data are few.
        owner = torch.arange(errors.shape[1]) % NUM_CRITICS
        loss = errors.gather(0, owner[None]).mean() * NUM_CRITICS
        weights: list[Tensor] = list(self.parameters())
        gradients = list(torch.autograd.grad(loss, weights))
        # torch's own function: its class would import the compiler, in seconds.
        with torch.no_grad():
            adam(
                weights, gradients, self._first, self._second, [], self._steps,
                amsgrad=False, beta1=BETAS[0], beta2=BETAS[1], lr=self._lr, weight_decay=0.0,
                eps=EPSILON, maximize=False,
            )  # fmt: skip
        return errors.mean().item()

    def get_optimizer(self) -> dict[str, Tensor]:
        """Moments and steps of Adam, by name and number of the parameter."""
        lists = {"first": self._first, "second": self._second, "steps": self._steps}
        return {
            f"{name}.{number}": tensor
            for name, tensors in lists.items()
            for number, tensor in enumerate(tensors)
        }

    def set_optimizer(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `get_optimizer` gave."""
        numbers = range(len(self._first))
        self._first = [tensors[f"first.{number}"] for number in numbers]
        self._second = [tensors[f"second.{number}"] for number in numbers]
        self._steps = [tensors[f"steps.{number}"] for number in numbers]
