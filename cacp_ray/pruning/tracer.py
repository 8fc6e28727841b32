"""What the traced forward pass remembers: labels of tensors and parameters (`forward_pass`)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from cacp_ray.pruning.labels import NEUTRAL, LabelSets, compact, varying_dims
from cacp_ray.pruning.latency_cost import LayerShape
from cacp_ray.pruning.torch_types import Convolution, named_modules

SHARED = 64  # most channels that may share a place; more, such as tokens, all freeze


@dataclass(frozen=True)
class LayerCall:
    """One use of a convolution, linear layer or matrix product.

    It costs factor * (outputs kept) * (inputs kept) MACs.
    """

    weight: str | None  # name of the layer's weight; None for a product of activations
    factor: int  # MACs of one output with one input
    outputs: Tensor  # (C_out,) labels
    inputs: Tensor | None  # (C_in,) labels; None where their number is fixed and part of the factor
    is_mixing: bool = False  # plain 2-D convolution or linear layer: its weight is solvable
    height: int = 1  # rows of the output, 1 for linear
    width: int = 1  # columns of the output
    stride: int = 1  # vertical stride, 1 for linear
    kernel: int = 1  # height of the kernel, 1 for linear
    shape: LayerShape | None = None  # None for all but 2-D convolutions and linear layers


@dataclass
class Trace:
    """What one forward pass showed."""

    sets: LabelSets = field(default_factory=LabelSets)
    calls: list[LayerCall] = field(default_factory=list[LayerCall])  # in the order of the pass
    # (name, dim) of a parameter or buffer -> (size,) labels, where it follows channels
    dims: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])
    # convolution weight -> prefix of the BN that alone takes its output
    batch_norms: dict[str, str] = field(default_factory=dict[str, str])
    # operations with work and no cost formula -> times they ran
    uncounted: Counter[str] = field(default_factory=Counter[str])


class Tracer:
    """Labels tensors and parameters while the pass runs."""

    def __init__(self, model: nn.Module, known: Trace | None = None) -> None:
        """`known` is what an earlier pass showed: this one adds to its labels."""
        self.trace = Trace() if known is None else Trace(known.sets, dims=known.dims)
        self.sets = self.trace.sets
        self._labels: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # keeps ids unique while the pass runs
        self._names: dict[int, str] = {}  # parameters and buffers
        self._weights: dict[int, str] = {}  # weights of layers and what is computed from them
        self._transposed: set[int] = set()  # weights seen through .t()
        # By weight: labels (C_out,) of gains of a layer's filters, which follow its outputs.
        self.gains: dict[str, list[Tensor]] = defaultdict(list)
        self._elements: dict[str, Tensor] = {}  # parameters used element by element
        self._bases: dict[int, Tensor] = {}  # view -> what it looks into
        self._views: dict[int, list[Tensor]] = defaultdict(list)
        self._made_by: dict[int, str] = {}
        self._users: dict[str, int] = defaultdict(int)
        self._solvable: set[str] = set()
        self.standardised: set[str] = set()  # weights whose filters are normalised over inputs
        self._spoilt: dict[str, str] = {}
        self.shapes: dict[str, torch.Size] = {}  # of layers' weights
        owners: Counter[int] = Counter()
        for path, module in named_modules(model):
            for local, tensor in module.named_parameters(path, recurse=False):
                is_layer = isinstance(module, (Convolution, nn.Linear))
                if is_layer and local == f"{path}.weight".lstrip("."):
                    owners[id(tensor)] += 1
                    self._weights.setdefault(id(tensor), local)
                    self.shapes[local] = tensor.shape
                    # A weight that two layers share cannot be solved for on the inputs of one.
                    if isinstance(module, (nn.Conv2d, nn.Linear)) and owners[id(tensor)] == 1:
                        self._solvable.add(local)
                    else:
                        self._solvable.discard(self._weights[id(tensor)])
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._names[id(tensor)] = name
            self._kept.append(tensor)

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Labels a tensor; `labels` has its shape."""
        self._labels[id(tensor)] = labels
        self._kept.append(tensor)

    def get(self, tensor: Tensor) -> Tensor:
        """The labels of a tensor; a parameter used element by element gets fresh ones."""
        if id(tensor) in self._labels:
            return self.canonical(self._labels[id(tensor)])
        name = self._names.get(id(tensor))
        if name is not None and tensor.numel() > 1 and tensor.is_floating_point():
            if name not in self._elements:
                self._elements[name] = self.sets.new(tensor.numel()).reshape(tensor.shape)
            return self._elements[name]
        return torch.tensor(NEUTRAL).expand(tensor.shape)

    def canonical(self, labels: Tensor) -> Tensor:
        """The same labels, each replaced by the one that stands for its set."""
        return torch.as_tensor(self.sets.find(compact(labels).numpy())).expand(labels.shape)

    def has_views(self, tensor: Tensor) -> bool:
        """Whether other tensors look into the same memory."""
        return id(tensor) in self._bases or id(tensor) in self._views

    def is_labelled(self, tensor: Tensor) -> bool:
        """Whether a tensor has labels of its own."""
        return id(tensor) in self._labels

    def name_of(self, tensor: Tensor) -> str | None:
        """The name of a parameter or buffer."""
        return self._names.get(id(tensor))

    def weight_of(self, tensor: Tensor) -> str | None:
        """The name of the layer's weight that a tensor is or is computed from."""
        return self._weights.get(id(tensor))

    def is_weight_itself(self, tensor: Tensor, name: str) -> bool:
        """Whether a tensor is the parameter `name` itself, of a layer that can be solved for."""
        return name in self._solvable and self._names.get(id(tensor)) == name

    def is_transposed(self, weight: Tensor) -> bool:
        """Whether a weight is seen through .t()."""
        return id(weight) in self._transposed

    def derive(
        self, out: Tensor, source: Tensor, *, transpose: bool = False, is_same: bool = False
    ) -> None:
        """Records that `out` is computed from one layer's weight alone, or is that weight again."""
        self._weights[id(out)] = self._weights[id(source)]
        if self.is_transposed(source) != transpose:
            self._transposed.add(id(out))
        if is_same and id(source) in self._names:
            self._names[id(out)] = self._names[id(source)]
        self._kept.append(out)

    def use_elements(self, parameter: Tensor, labels: Tensor) -> None:
        """Labels a parameter that meets channels element by element; `labels` has its shape."""
        known = self._elements.setdefault(self._names[id(parameter)], labels)
        self.sets.unite(known, labels)

    def alias(self, out: Tensor, source: Tensor) -> None:
        """Records that a parameter is seen under another id."""
        self._names[id(out)] = self._names[id(source)]
        self._kept.append(out)

    def set_base(self, view: Tensor, source: Tensor) -> None:
        """Records that `view` looks into the memory of `source`."""
        base = self._bases[id(view)] = self._bases.get(id(source), source)
        self._views[id(base)].append(view)

    def write_through(self, view: Tensor) -> bool:
        """Copies a view's labels to all tensors on the same memory; False where it cannot."""
        base = self._bases.get(id(view), view)
        if not base.is_contiguous():
            return False
        memory = self.get(base).clone(memory_format=torch.contiguous_format).reshape(-1)

        def look(tensor: Tensor) -> Tensor:
            offset = tensor.storage_offset() - base.storage_offset()
            return memory.as_strided(tensor.shape, tensor.stride(), offset)

        look(view).copy_(self.get(view))
        for tensor in (base, *self._views[id(base)]):
            self.put(tensor, look(tensor))
        return True

    def use(self, tensors: Sequence[Tensor]) -> None:
        """Counts the uses of layers' outputs."""
        for tensor in tensors:
            if id(tensor) in self._made_by:
                self._users[self._made_by[id(tensor)]] += 1

    def bind(self, name: str, dim: int, labels: Tensor) -> Tensor:
        """Records that position i of a dimension holds channel labels[i]; repeats unite."""
        known = self.trace.dims.setdefault((name, dim), labels.clone())
        self.sets.unite(known, labels)
        return known

    def channels(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(C,) labels along `dim`; unites channels that share a place, as after a pixel shuffle."""
        labels = compact(self.get(tensor)).movedim(dim, 0)
        labels = labels.expand(tensor.shape[dim], *labels.shape[1:]).flatten(1)
        if labels.shape[1] == 1:
            return labels[:, 0]
        first = labels.amax(1)
        # Padding is neutral, so it may share a place with channels.
        is_shared = ((labels != first[:, None]) & (labels != NEUTRAL)).any(1)
        for row in labels[is_shared]:
            together = torch.as_tensor(np.unique(row.numpy()))
            if len(together) > SHARED:
                self.sets.freeze(together, "channels of several layers share a place")
            else:
                self.sets.unite(together[-1], together[:-1])
        return self.canonical(first)

    def add_layer(self, call: LayerCall, out: Tensor) -> None:
        """Records a use of a layer that made `out`."""
        self.trace.calls.append(call)
        if call.weight is not None:
            for labels in self.gains.pop(call.weight, []):
                self.sets.unite(labels, call.outputs)
            if call.weight in self.standardised and call.inputs is not None:
                self.sets.mark_normalised(call.inputs)
            if call.weight in self._spoilt:
                self._freeze_weight(call.weight, self._spoilt[call.weight])
            self._made_by[id(out)] = call.weight

    def add_batch_norm(self, x: Tensor, prefix: str) -> None:
        """Records that a BN layer takes the output `x` of a layer."""
        if id(x) in self._made_by:
            self.trace.batch_norms[self._made_by[id(x)]] = prefix

    def freeze_all(self, tensors: Sequence[Tensor], reason: str) -> None:
        """Freezes every channel of some tensors."""
        for tensor in tensors:
            if (weight := self.weight_of(tensor)) is not None:
                self._freeze_weight(weight, reason)
            else:
                self.sets.freeze(self.get(tensor), reason)

    def _freeze_weight(self, weight: str, reason: str) -> None:
        self._spoilt[weight] = reason
        for (name, _), labels in self.trace.dims.items():
            if name == weight:
                self.sets.freeze(labels, reason)
        for labels in self.gains.pop(weight, []):
            self.sets.freeze(labels, reason)

    def finish(self) -> None:
        """Settles what only the whole pass can tell: lone BN layers and element-wise parameters."""
        norms = self.trace.batch_norms
        served = Counter(norms.values())  # a BN after two layers belongs to neither
        self.trace.batch_norms = {
            w: norm for w, norm in norms.items() if self._users[w] == 1 and served[norm] == 1
        }
        for name, labels in self._elements.items():
            roots = torch.as_tensor(self.sets.find(labels.numpy()))
            dims = varying_dims(roots)
            if len(dims) == 1:
                line = roots.movedim(dims[0], 0).reshape(roots.shape[dims[0]], -1).amax(1)
                self.bind(name, dims[0], line)
            elif dims:
                self.sets.freeze(roots, f"parameter {name} mixes them")
