"""SGD that starts at once.

The first `torch.optim.Optimizer` of a process imports torch._dynamo, which takes 4 s of CPU time in
each process, as much as a short fine-tuning. This class calls torch's own functional SGD, so its
steps and its saved state are those of `torch.optim.SGD`.
"""

from typing import Any

import torch
from torch import nn
from torch.optim.sgd import sgd


class SGD:
    """SGD with Nesterov momentum in [0, 1], where 0 is plain SGD.

    Groups have `params` and `weight_decay`. They start with `lr`, which the caller changes.
    """

    def __init__(self, param_groups: list[dict[str, Any]], *, lr: float, momentum: float) -> None:
        self.param_groups = [{**group, "lr": lr} for group in param_groups]
        self.momentum = momentum
        self._buffers: dict[nn.Parameter, torch.Tensor | None] = {}

    def zero_grad(self) -> None:
        """Frees the gradients."""
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Updates every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            buffers = [self._buffers.get(p) for p in parameters]
            sgd(
                parameters,
                [p.grad for p in parameters],
                buffers,
                weight_decay=group["weight_decay"],
                momentum=self.momentum,
                lr=group["lr"],
                dampening=0.0,
                nesterov=self.momentum > 0,
                maximize=False,
            )
            self._buffers.update(zip(parameters, buffers, strict=True))

    def state_dict(self) -> dict[str, Any]:
        """Momentum by position of the parameter, in the layout of `torch.optim.SGD`."""
        state = {
            position: {"momentum_buffer": self._buffers[parameter]}
            for position, parameter in enumerate(self._parameters())
            if parameter in self._buffers
        }
        return {"state": state}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Loads a `state_dict` of this class or of `torch.optim.SGD`, from any device."""
        parameters = self._parameters()
        self._buffers = {
            parameters[position]: entry["momentum_buffer"].to(parameters[position].device)
            for position, entry in saved["state"].items()
        }

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]
