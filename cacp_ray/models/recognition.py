"""Which of the package's networks a file of weights belongs to, for messages."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cacp_ray.models.checkpoints import COUNTERS, prefix_of
from cacp_ray.models.factory import CIFAR_MODELS


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """The network and number of classes that the tensors fit, as a sentence; empty for others."""
    for name, build in CIFAR_MODELS.items():
        with torch.device("meta"):
            model = build()
        own = {
            key: tensor.shape
            for key, tensor in model.state_dict().items()
            if not key.endswith(COUNTERS)
        }
        prefix = prefix_of(tensors, own.keys())
        shapes = {
            key.removeprefix(prefix): tensor.shape
            for key, tensor in tensors.items()
            if key.startswith(prefix) and not key.endswith(COUNTERS)
        }
        classes = {shape[:1] for key, shape in shapes.items() if own.get(key) != shape}
        body = {key: shape[1:] for key, shape in own.items()}
        if {key: shape[1:] for key, shape in shapes.items()} == body and len(classes) <= 1:
            (number,) = classes.pop() if classes else own[list(own)[-1]][:1]
            return f"they are of {name} with {number} classes"
    return ""
