"""What a network is called with: one tensor, several in their order, or several by name."""

# pyright: basic
# Basic: anything may be handed in, and hooks of torch are private.

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize, prune
from torch.utils._pytree import tree_flatten, tree_map_only

from cacp_ray.errors import ConfigError

Inputs: TypeAlias = Tensor | tuple[Any, ...] | list[Any] | dict[str, Any]


def check_inputs(inputs: Any, name: str = "example_inputs") -> Inputs:
    """Inputs of one example, as plain tensors; refuses what no network can be called with.

    Raises:
        ConfigError: No tensor, tuple or dictionary of tensors, or tensors without a batch.
    """
    if not isinstance(inputs, Tensor | tuple | list | dict):
        raise ConfigError(
            f"{name} is of type {type(inputs).__name__}: give a tensor, a tuple of them, or a "
            "dictionary of them by argument"
        )
    tensors = tensors_of(inputs)
    if not tensors:
        raise ConfigError(f"{name} holds no tensor: give (1, C, H, W), or what the network takes")
    if isinstance(inputs, dict) and not all(isinstance(key, str) for key in inputs):
        raise ConfigError(f"{name} has keys that are no names of arguments")
    for tensor in tensors:
        if tensor.is_meta:
            raise ConfigError(f"{name} has a tensor on the meta device: give one with values")
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise ConfigError(
                f"{name} has a tensor of shape {tuple(tensor.shape)}: the first dimension is the "
                "batch, of one or more"
            )
    # Cost is that of one example, where the first dimension is a batch.
    is_batch = len({tensor.shape[0] for tensor in tensors}) == 1
    return map_inputs(
        lambda tensor: (tensor[:1] if is_batch else tensor).detach().as_subclass(Tensor), inputs
    )


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """All tensors, in their order."""
    return [leaf for leaf in tree_flatten(inputs)[0] if isinstance(leaf, Tensor)]


def map_inputs(change: Callable[[Tensor], Tensor], inputs: Inputs) -> Inputs:
    """The same inputs with every tensor changed."""
    return tree_map_only(Tensor, change, inputs)


def call(model: nn.Module, inputs: Inputs) -> Any:
    """Runs a network on its inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, Sequence):
        return model(*inputs)
    return model(inputs)


def repeat_batch(inputs: Inputs) -> Inputs:
    """Twice the batch: a batch norm cannot train on one value a channel."""
    return map_inputs(lambda tensor: torch.cat([tensor, tensor]), inputs)


def describe_shapes(inputs: Inputs) -> str:
    """Shapes of all tensors, for messages."""
    shapes = [str(tuple(tensor.shape)) for tensor in tensors_of(inputs)]
    return f"shape {shapes[0]}" if len(shapes) == 1 else f"shapes {', '.join(shapes)}"


def as_written(model: nn.Module) -> AbstractContextManager[Any]:
    """Runs layers as they were written where `compile` was called on them; compiling takes long."""
    is_compiled = any(
        module._compiled_call_impl is not None or hasattr(module, "_orig_mod")
        for module in model.modules()
    )
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def check_network(model: Any) -> nn.Module:
    """Refuses what is no network that can be cut; a compiled one is taken as what it compiles.

    Raises:
        ConfigError: No `nn.Module`, or one whose layers are not there to be cut.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"the network is of type {type(model).__name__}: give a torch.nn.Module")
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    if isinstance(model, torch.jit.ScriptModule):
        raise ConfigError("the network is TorchScript: give the nn.Module that it was made from")
    if isinstance(model, torch.fx.GraphModule) and "train" in vars(model):  # it replaces it
        raise ConfigError("the network is an exported program: give the nn.Module it was made from")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise ConfigError(
                f"{name} of the network is on the meta device, without values: load its weights "
                "first (load_state_dict(..., assign=True))"
            )
    for name, module in model.named_modules():
        if fault := _fault_of(module):
            where = f"layer {name}" if name else "the network"
            raise ConfigError(f"{where} {fault}")
    return model


def _fault_of(module: nn.Module) -> str | None:
    """Why a module cannot be cut as it stands, with the next step."""
    if isinstance(module, LazyModuleMixin):
        return "is lazy, without weights yet: run the network once on an input first"
    if parametrize.is_parametrized(module):
        names = ", ".join(vars(module)["_modules"]["parametrizations"])
        return (
            f"computes its {names} from other parameters: call "
            f"torch.nn.utils.parametrize.remove_parametrizations on it first"
        )
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            return f"has a pruning mask on its {hook._tensor_name}: call prune.remove on it first"
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            return (
                f"computes its {hook.name} by {type(hook).__name__}: call "
                "torch.nn.utils.remove_weight_norm or remove_spectral_norm on it first"
            )
    kind = type(module).__module__
    if "quantized" in kind or ".qat" in kind or "fake_quantize" in kind:
        return (
            f"is quantised ({type(module).__name__}): prune the float network, then quantise the "
            "small one"
        )
    return None
