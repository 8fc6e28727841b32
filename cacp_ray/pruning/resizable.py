"""A network whose tensors may take any sizes; sizes that layers remember follow their tensors."""

import copy
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cacp_ray.pruning.axis import drops_groups
from cacp_ray.pruning.torch_types import Convolution, RunningNorm, named_modules


@dataclass(frozen=True)
class Sizes:
    """A module before any cut."""

    attributes: dict[str, int]  # its integer attributes
    shapes: dict[str, torch.Size]  # shapes of its own parameters and buffers


# Names of attributes that hold a number of channels: those that a block takes, those that it gives,
# and either; and of those that hold the number of parts of a block's convolutions.
TAKEN = {
    "in_channels", "in_features", "in_chs", "in_ch", "in_planes", "inplanes", "in_dim", "in_width",
    "in_chans", "input_dim", "inp",
}  # fmt: skip
GIVEN = {
    "out_channels", "out_features", "out_chs", "out_ch", "out_planes", "out_dim", "out_width",
    "output_dim", "oup", "num_features",
}  # fmt: skip
EITHER = {
    "channels", "num_channels", "features", "planes", "dim", "embed_dim", "width", "num_filters",
}  # fmt: skip
PARTS = {"groups", "conv_groups"}
# Methods that build a block's layers anew from its numbers.
HELPERS = ("reparameterize", "fuse", "switch_to_deploy", "convert_to_deploy", "merge_kernel")

Role = Literal["takes", "gives", "parts"]
Size = tuple[nn.Module, str]  # a layer and its attribute
# Layer -> container, its attribute, and what reads its value now.
Links = dict[nn.Module, list[tuple[nn.Module, str, Callable[[], int]]]]


class ResizableNetwork:
    """A copy of a network whose tensors are exchanged in place; each thread needs its own."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()
        self.model.requires_grad_(False)
        self._owners: dict[str, list[tuple[nn.Module, str, Sizes]]] = {}
        shared: dict[int, str] = {}
        for path, module in named_modules(self.model):
            sizes = read_sizes(module)
            for local, tensor in own_tensors(module).items():
                name = f"{path}.{local}" if path else local
                owner = (module, local, sizes)
                self._owners.setdefault(shared.setdefault(id(tensor), name), []).append(owner)
        self._links = find_links(self.model)

    def load(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        """Puts tensors of any shape in place and returns the network."""
        touched: dict[nn.Module, Sizes] = {}
        for name, tensor in tensors.items():
            owners, kind, value = self._owners[name], "_buffers", tensor
            if owners[0][1] in vars(owners[0][0])["_parameters"]:
                # nn.Parameter(tensor, requires_grad=False), in a third of its time.
                kind, value = "_parameters", Tensor._make_subclass(nn.Parameter, tensor, False)
            for module, local, sizes in owners:
                vars(module)[kind][local] = value
                touched[module] = sizes
        for module, sizes in touched.items():
            sync_attributes(module, sizes)
        for module in touched.keys() & self._links.keys():
            for container, attribute, read in self._links[module]:
                vars(container)[attribute] = read()
        return self.model


def build_subnet(model: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """An independent network with copies of `tensors`, ready to be trained or saved."""
    copies = {
        name: tensor.clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    small = ResizableNetwork(model).load(copies)
    _train_as(model, small)
    return small


def copy_as(model: nn.Module, net: nn.Module) -> nn.Module:
    """An independent copy of a cut network, whose parameters are trained where the model's are."""
    copied = copy.deepcopy(net)
    _train_as(model, copied)
    return copied


def _train_as(model: nn.Module, small: nn.Module) -> None:
    is_trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    for name, parameter in small.named_parameters():
        parameter.requires_grad_(is_trained[name])


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters, then buffers, of a module itself, by their local names."""
    own: dict[str, Tensor | None] = {**vars(module)["_parameters"], **vars(module)["_buffers"]}
    return {name: tensor for name, tensor in own.items() if tensor is not None}


def read_sizes(module: nn.Module) -> Sizes:
    """Sizes of a module's own attributes and tensors."""
    return Sizes(
        {name: value for name, value in vars(module).items() if type(value) is int},
        {name: tensor.shape for name, tensor in own_tensors(module).items()},
    )


def sync_attributes(module: nn.Module, whole: Sizes) -> None:
    """Sets the sizes that a layer's forward or repr reads to those of its new tensors."""
    before = whole.attributes
    # Past nn.Module's own attribute access, which is ten times slower.
    own = vars(module)
    if isinstance(module, Convolution):
        _sync_convolution(module, before, own)
    elif isinstance(module, nn.Linear):
        own["out_features"], own["in_features"] = module.weight.shape
    elif isinstance(module, RunningNorm):
        line: Tensor | None = own["_buffers"]["running_mean"]
        if line is None:
            line = own["_parameters"]["weight"]
        if line is not None:
            own["num_features"] = line.shape[0]
    elif isinstance(module, nn.GroupNorm) and module.affine:
        channels, groups = before["num_channels"], before["num_groups"]
        module.num_channels = len(module.weight)
        if groups > 1 and drops_groups(channels, groups):
            module.num_groups = module.num_channels // (channels // groups)
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.elementwise_affine:
        module.normalized_shape = tuple(module.weight.shape)
    else:
        _sync_by_name(module, whole)


def _sync_convolution(module: Convolution, before: Mapping[str, int], own: dict[str, Any]) -> None:
    weight: Tensor | None = own["_parameters"].get("weight")
    if weight is None:  # parametrized
        weight = module.weight
    first, second = weight.shape[:2]
    groups, inputs, outputs = before["groups"], before["in_channels"], before["out_channels"]
    if groups > 1:
        if drops_groups(inputs, groups):
            own["groups"] = first // ((inputs if own["transposed"] else outputs) // groups)
        second *= own["groups"]
    if own["transposed"]:
        first, second = second, first
    own["in_channels"], own["out_channels"] = second, first


def find_links(model: nn.Module) -> Links:
    """Numbers of channels that blocks without tensors of their own keep for their layers.

    A helper that fuses or deploys a block reads them. By its name, a number is what the first layer
    of the block takes, what the last one gives, or the parts of its first convolution; it must be
    that now. One that may be either is both, or stays.
    """
    links: Links = {}
    for _, block in named_modules(model):
        if own_tensors(block) or isinstance(block, (Convolution, nn.Linear, RunningNorm)):
            continue
        has_helper = any(hasattr(block, helper) for helper in HELPERS)
        for attribute, value in vars(block).items():
            if type(value) is int and (roles := _roles_of(attribute, has_helper=has_helper)):
                found = [_find_size(block, role, value) for role in roles]
                sizes = [size for size in found if size is not None]
                read = partial(_read_same, sizes, value)
                for layer, _ in sizes if len(sizes) == len(roles) else ():
                    links.setdefault(layer, []).append((block, attribute, read))
    return links


def _roles_of(attribute: str, *, has_helper: bool) -> tuple[Role, ...]:
    """What a number of this name is of the block that keeps it.

    Names that also stand for other things, such as a scale of a forward pass, count only in blocks
    that have a helper for deployment.
    """
    if attribute in EITHER:
        return ("takes", "gives") if has_helper else ()
    if attribute in PARTS and not has_helper:
        return ()
    roles: dict[Role, Set[str]] = {"takes": TAKEN, "gives": GIVEN, "parts": PARTS}
    return tuple(role for role, names in roles.items() if attribute in names)


def _find_size(block: nn.Module, role: Role, value: int) -> Size | None:
    """The layer of a block whose size is this number, the last one of what it gives."""
    layers = [*block.modules()]
    for layer in layers[::-1] if role == "gives" else layers:
        attribute = None
        if isinstance(layer, Convolution):
            attribute = {"takes": "in_channels", "gives": "out_channels", "parts": "groups"}[role]
        elif isinstance(layer, nn.Linear) and role != "parts":
            attribute = "in_features" if role == "takes" else "out_features"
        elif isinstance(layer, RunningNorm):  # a block may be a norm alone, each channel a part
            attribute = "num_features"
        if attribute is not None and vars(layer)[attribute] == value:
            return layer, attribute
    return None


def _read_same(sizes: Sequence[Size], value: int) -> int:
    """The number that all these attributes hold now; the old one where they differ."""
    now = {vars(layer)[attribute] for layer, attribute in sizes}
    return now.pop() if len(now) == 1 else value


def _sync_by_name(module: nn.Module, whole: Sizes) -> None:
    """Gives a user's own layer new sizes: numbers of channels that equal a cut dimension follow it.

    The name of an attribute tells whether it is one. It keeps its value where two dimensions of
    that size were cut differently. Trying the plan out finds what this gets wrong.
    """
    sizes_of: dict[int, set[int]] = {}
    for name, tensor in own_tensors(module).items():
        for old, size in zip(whole.shapes[name], tensor.shape, strict=True):
            sizes_of.setdefault(old, set()).add(size)
    for name, value in whole.attributes.items():
        sizes = sizes_of.get(value, set())
        if name in TAKEN | GIVEN | EITHER and len(sizes) == 1:
            setattr(module, name, next(iter(sizes)))
