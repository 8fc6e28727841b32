"""Labels of tensors and parameters while a forward pass is followed (`trace`)."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from cacp_ray.pruning.labels import NEUTRAL, LabelSets, compact, varying_dims
from cacp_ray.pruning.latency_cost import LayerShape

SHARED = 64  # channels in one place; of more, such as tokens for channels, nothing is left to cut


@dataclass(frozen=True)
class LayerCall:
    """One use of a convolution, linear layer or matrix product.

    It costs factor * (outputs kept) * (inputs kept) MACs.

    Attributes:
        weight: Name of its weight; None for a product of activations.
        factor: MACs of one output with one input.
        outputs: (C_out,) labels.
        inputs: (C_in,) labels of what each output mixes; None where that is fixed, as in depthwise
            convolutions, and part of the factor.
        is_mixing: Whether each output is a sum over all inputs by a plain 2-D convolution or
            linear layer, whose weights can be solved for.
        height: Rows of the output, 1 for linear.
        width: Columns of the output.
        stride: Of a convolution, 1 for linear.
        kernel: Height of the kernel, 1 for linear.
        shape: What its time depends on; None where it is neither a 2-D convolution nor linear.
    """

    weight: str | None
    factor: int
    outputs: Tensor
    inputs: Tensor | None
    is_mixing: bool = False
    height: int = 1
    width: int = 1
    stride: int = 1
    kernel: int = 1
    shape: LayerShape | None = None


@dataclass
class Trace:
    """What one forward pass showed.

    Attributes:
        sets: United labels.
        calls: Uses of weights, in the order of the forward pass.
        dims: Labels of each sliced dimension of a parameter or buffer: (name, dim) -> (size,).
        batch_norms: Convolution weight -> prefix of the BN that alone takes its output.
    """

    sets: LabelSets = field(default_factory=LabelSets)
    calls: list[LayerCall] = field(default_factory=list)
    dims: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    batch_norms: dict[str, str] = field(default_factory=dict)


class Tracer:
    """Labels of tensors and parameters while the pass runs."""

    def __init__(self, model: nn.Module) -> None:
        self.trace = Trace()
        self.sets = self.trace.sets
        self._labels: dict[int, Tensor] = {}
        self._kept: list[Tensor] = []  # keeps ids unique while the pass runs
        self._names: dict[int, str] = {}  # parameters and buffers
        self._weights: dict[int, str] = {}  # weights of layers and what is computed from them
        self._transposed: set[int] = set()  # weights seen through .t()
        self._side: dict[str, list[Tensor]] = defaultdict(list)  # labels that follow outputs
        self._elements: dict[str, Tensor] = {}  # parameters used element by element
        self._bases: dict[int, Tensor] = {}  # view -> what it looks into
        self._views: dict[int, list[Tensor]] = defaultdict(list)
        self._made_by: dict[int, str] = {}
        self._users: dict[str, int] = defaultdict(int)
        self._solvable: set[str] = set()
        self._standardised: set[str] = set()
        self._spoilt: dict[str, str] = {}
        self._shapes: dict[str, torch.Size] = {}
        owners: Counter[int] = Counter()
        for path, module in model.named_modules():
            for local, tensor in module.named_parameters(path, recurse=False):
                is_layer = isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))
                if is_layer and local == f"{path}.weight".lstrip("."):
                    owners[id(tensor)] += 1
                    self._weights.setdefault(id(tensor), local)
                    self._shapes[local] = tensor.shape
                    # Statistics of one layer cannot speak for another that shares its weight.
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
        """The labels of a tensor; parameters get fresh ones when first used by elements."""
        if id(tensor) in self._labels:
            return self.canonical(self._labels[id(tensor)])
        name = self._names.get(id(tensor))
        if name is not None and tensor.numel() > 1 and tensor.is_floating_point():
            if name not in self._elements:
                self._elements[name] = self.sets.new(tensor.numel()).reshape(tensor.shape)
            return self._elements[name]
        return torch.tensor(NEUTRAL).expand(tensor.shape)

    def canonical(self, labels: Tensor) -> Tensor:
        """The label of its set for every label."""
        return torch.from_numpy(self.sets.find(compact(labels).numpy())).expand(labels.shape)

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
        """The name of the layer's weight that a tensor is, or is computed from."""
        return self._weights.get(id(tensor))

    def is_weight_itself(self, tensor: Tensor, name: str) -> bool:
        """Whether it is the very parameter, of a layer whose weights can be solved for."""
        return name in self._solvable and self._names.get(id(tensor)) == name

    def is_transposed(self, weight: Tensor) -> bool:
        """Whether a weight is seen through .t()."""
        return id(weight) in self._transposed

    def derive(
        self, out: Tensor, source: Tensor, *, transpose: bool = False, is_same: bool = False
    ) -> None:
        """Says that `out` is computed from one layer's weight alone, or is that weight again."""
        self._weights[id(out)] = self._weights[id(source)]
        if self.is_transposed(source) != transpose:
            self._transposed.add(id(out))
        if is_same and id(source) in self._names:
            self._names[id(out)] = self._names[id(source)]
        self._kept.append(out)

    def normalise_inputs(self, weight: str) -> None:
        """Says that a layer's filters are normalised over their inputs."""
        self._standardised.add(weight)

    def shape_of(self, weight: str) -> torch.Size:
        """The shape of a layer's weight."""
        return self._shapes[weight]

    def use_elements(self, parameter: Tensor, labels: Tensor) -> None:
        """Labels a parameter, of the same shape, that meets channels element by element."""
        known = self._elements.setdefault(self._names[id(parameter)], labels)
        self.sets.unite(known, labels)

    def follow_outputs(self, weight: str, labels: Tensor) -> None:
        """Says that labels (C_out,) belong to the outputs of a layer: gains of its filters."""
        self._side[weight].append(labels)

    def alias(self, out: Tensor, source: Tensor) -> None:
        """Says that a parameter is seen under another id."""
        self._names[id(out)] = self._names[id(source)]
        self._kept.append(out)

    def set_base(self, view: Tensor, source: Tensor) -> None:
        """Says that `view` looks into the memory of `source`."""
        base = self._bases[id(view)] = self._bases.get(id(source), source)
        self._views[id(base)].append(view)

    def write_through(self, view: Tensor) -> bool:
        """Labels written into a view show in all that looks into the same memory."""
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
        """Counts who reads the output of a layer."""
        for tensor in tensors:
            if id(tensor) in self._made_by:
                self._users[self._made_by[id(tensor)]] += 1

    def bind(self, name: str, dim: int, labels: Tensor) -> Tensor:
        """Says that position i of a dimension holds channel labels[i]; again: unites both."""
        known = self.trace.dims.setdefault((name, dim), labels.clone())
        self.sets.unite(known, labels)
        return known

    def channels(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(C,) labels along `dim`; channels that share a place, as after pixel shuffle, unite."""
        labels = compact(self.get(tensor)).movedim(dim, 0)
        labels = labels.expand(tensor.shape[dim], *labels.shape[1:]).flatten(1)
        if labels.shape[1] == 1:
            return labels[:, 0]
        first = labels.amax(1)
        # Padding is neutral, so it may stand beside channels.
        bad = ((labels != first[:, None]) & (labels != NEUTRAL)).any(1)
        for row in labels[bad]:
            together = row.unique()
            if len(together) > SHARED:
                self.sets.freeze(together, "channels of several layers share a place")
            else:
                self.sets.unite(together[-1], together[:-1])
        return self.canonical(first)

    def add_layer(self, call: LayerCall, out: Tensor) -> None:
        """Records a use of a layer that made `out`."""
        self.trace.calls.append(call)
        if call.weight is not None:
            for labels in self._side.pop(call.weight, []):
                self.sets.unite(labels, call.outputs)
            if call.weight in self._standardised and call.inputs is not None:
                self.sets.mark_normalised(call.inputs)
            if call.weight in self._spoilt:
                self._freeze_weight(call.weight, self._spoilt[call.weight])
            self._made_by[id(out)] = call.weight

    def add_batch_norm(self, x: Tensor, prefix: str) -> None:
        """Records that a BN layer takes what a layer made."""
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
        for labels in self._side.pop(weight, []):
            self.sets.freeze(labels, reason)

    def finish(self) -> None:
        """Settles what only the whole pass can tell: lone BN layers, element-wise parameters."""
        norms = self.trace.batch_norms
        served = Counter(norms.values())  # a BN after two layers belongs to neither
        self.trace.batch_norms = {
            w: norm for w, norm in norms.items() if self._users[w] == 1 and served[norm] == 1
        }
        for name, labels in self._elements.items():
            roots = torch.from_numpy(self.sets.find(labels.numpy()))
            dims = varying_dims(roots)
            if len(dims) == 1:
                line = roots.movedim(dims[0], 0).reshape(roots.shape[dims[0]], -1).amax(1)
                self.bind(name, dims[0], line)
            elif dims:
                self.sets.freeze(roots, f"parameter {name} mixes them")
