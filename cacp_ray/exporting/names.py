"""Names of the tensors that go into a network and come out of it."""

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import (
    GetAttrKey,
    MappingKey,
    SequenceKey,
    tree_flatten,
    tree_flatten_with_path,
)

from cacp_ray.pruning.inputs import Inputs


def name_inputs(model: nn.Module, inputs: Inputs) -> list[str]:
    """Names of all inputs: `image` for a lone tensor, else the names of the network's arguments."""
    if isinstance(inputs, Tensor):
        return ["image"]
    if isinstance(inputs, Mapping):
        return list(inputs)
    arguments = inspect.signature(model.forward).bind(*inputs).arguments
    return [name for name, _ in _name_tensors(arguments)]


def name_outputs(output: Any) -> list[tuple[str, Tensor]]:
    """All tensors that a network returns, in the order of its pytree, with their names.

    A lone tensor is `logits`. The others have the keys, positions and attributes that lead to
    them, such as `out` or `boxes.1`.
    """
    return [("logits", output)] if isinstance(output, Tensor) else _name_tensors(output)


def _name_tensors(tree: Any) -> list[tuple[str, Tensor]]:
    if isinstance(tree, Mapping):
        tree = dict(tree)  # classes of one's own may be registered without names of their parts
    try:
        leaves = tree_flatten_with_path(tree)[0]
    except ValueError:  # such a class deeper inside
        leaves = [((SequenceKey(i),), leaf) for i, leaf in enumerate(tree_flatten(tree)[0])]
    return [(".".join(map(_name, path)), leaf) for path, leaf in leaves if isinstance(leaf, Tensor)]


def _name(key: Any) -> str:
    match key:
        case MappingKey():
            return str(key.key)
        case SequenceKey():
            return str(key.idx)
        case GetAttrKey():
            return key.name
        case _:  # of a class that names its parts in its own way
            return str(key)
