"""Calibration data: training examples for statistics, as images or as batches of a loader."""

# pyright: basic
# Basic: batches hold whatever a loader yields.

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map_only

from cacp_ray.data.images import ImageSet
from cacp_ray.errors import ConfigError, users_code
from cacp_ray.pruning.inputs import Inputs, call, map_inputs, tensors_of

BATCH_PIXELS = 2**19  # pixels passed at once: 512 images of 32x32, 10 of 224x224
PASSED = 125  # most images passed at once
Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]  # (network, batch) -> mean over the batch


@dataclass(frozen=True)
class Batch:
    """Some examples.

    Attributes:
        inputs: What the network is called with.
        content: What a loss reads: the batch as the loader yielded it.
    """

    inputs: Inputs
    content: Any = None

    def __len__(self) -> int:
        return len(tensors_of(self.inputs)[0])


@dataclass(frozen=True)
class Examples:
    """Batches of a loader, on the CPU."""

    batches: tuple[Batch, ...]

    def __len__(self) -> int:
        return sum(map(len, self.batches))


Calibration: TypeAlias = ImageSet | Examples


def classify(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of (images, labels), in nats."""
    images, labels = batch
    return functional.cross_entropy(model(images), labels)


def image_batches(
    images: Tensor, labels: Tensor | None = None, batch_size: int = PASSED
) -> Iterator[Batch]:
    """Normalised images (N, C, H, W) in batches that suit their size."""
    at_once = max(1, min(batch_size, BATCH_PIXELS // images.shape[2:].numel()))
    for start in range(0, len(images), at_once):
        part = slice(start, start + at_once)
        yield Batch(images[part], None if labels is None else (images[part], labels[part]))


def batches_of(calibration: Calibration) -> Iterable[Batch]:
    """All examples, in batches."""
    if isinstance(calibration, Examples):
        return calibration.batches
    return image_batches(*calibration.tensors())


def inputs_in_parts(calibration: Calibration, at_most: int) -> list[Inputs]:
    """All inputs; images in nearly equal parts of at most so many, so that none is alone."""
    if isinstance(calibration, Examples):
        return [batch.inputs for batch in calibration.batches]
    images = calibration.tensors()[0]
    return [*images.tensor_split(math.ceil(len(images) / at_most))]


def inputs_together(calibration: Calibration) -> Inputs:
    """As many inputs as one pass takes, in one batch."""
    if isinstance(calibration, ImageSet):
        return calibration.tensors()[0]
    first, *others = (batch.inputs for batch in calibration.batches)
    shapes = [tensor.shape[1:] for tensor in tensors_of(first)]
    # Batches of other sizes, as of images that were not cut to one, are left out.
    alike = [x for x in others if [tensor.shape[1:] for tensor in tensors_of(x)] == shapes]
    return join_inputs([first, *alike])


def join_inputs(parts: Sequence[Inputs]) -> Inputs:
    """Several batches as one."""
    columns = zip(*map(tensors_of, parts), strict=True)
    joined = iter([torch.cat(column) for column in columns])
    return map_inputs(lambda _: next(joined), parts[0])


def take_inputs_at(inputs: Inputs, part: slice) -> Inputs:
    """Some examples of a batch."""
    return map_inputs(lambda tensor: tensor[part], inputs)


def update_hash(digest: Any, calibration: Calibration) -> None:
    """Adds the content of calibration data to a hash."""
    if isinstance(calibration, Examples):
        for batch in calibration.batches:
            _hash_tree(digest, batch.content)
        return
    images = calibration.images
    digest.update(json.dumps([images.shape, calibration.mean, calibration.std]).encode())
    digest.update(np.ascontiguousarray(images).data)
    digest.update(np.ascontiguousarray(calibration.labels).data)


def _hash_tree(digest: Any, content: Any) -> None:
    leaves, structure = tree_flatten(content)
    digest.update(str(structure).encode())
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().view(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(hashlib.sha256(repr(leaf)[:10_000].encode()).digest())


def read_examples(loader: Iterable[Any], example_inputs: Inputs, count: int) -> Examples:
    """The first batches of a loader with at least `count` examples, or all of them.

    Args:
        loader: Yields tensors, tuples with the inputs first, or dictionaries.
        example_inputs: What the network is called with.
        count: Examples that are enough.

    Raises:
        ConfigError: The loader yields nothing, or inputs of another kind.
    """
    batches: list[Batch] = []
    seen = 0
    with users_code("the calibration loader fails"):
        for given in itertools.islice(loader, count):
            content = tree_map_only(Tensor, lambda t: t.detach().cpu(), given)
            batch = Batch(find_inputs(content, example_inputs), content)
            if not len(batch):
                raise ConfigError(
                    f"calibration batch {len(batches)} is empty ({describe_batch(content)}): yield "
                    "one example or more"
                )
            batches.append(batch)
            seen += len(batch)
            if seen >= count:
                break
    if not batches:
        raise ConfigError("the calibration loader yields no batch: give training data")
    return Examples(tuple(batches))


def find_inputs(content: Any, example_inputs: Inputs) -> Inputs:
    """What a network is called with, in a batch of a loader.

    A tuple or list begins with it: as one entry, or as many as the network takes. Of a dictionary,
    a network that is called by names takes those names.

    Raises:
        ConfigError: It is not there, or has other dimensions than the example inputs.
    """
    if isinstance(example_inputs, Mapping):
        if isinstance(content, list | tuple) and content and isinstance(content[0], Mapping):
            content = content[0]
        if not isinstance(content, Mapping) or not example_inputs.keys() <= content.keys():
            raise ConfigError(
                f"calibration batches are {describe_batch(content)}: the network is called with "
                f"{', '.join(example_inputs)}, so yield a dictionary with these keys"
            )
        inputs: Any = {name: content[name] for name in example_inputs}
    elif isinstance(example_inputs, Tensor):
        is_sequence = isinstance(content, list | tuple) and content
        inputs = content[0] if is_sequence else content
    else:
        is_sequence = isinstance(content, list | tuple) and content
        is_nested = is_sequence and isinstance(content[0], list | tuple)
        inputs = content[0] if is_nested else content
        if isinstance(inputs, list | tuple):
            inputs = tuple(inputs[: len(example_inputs)])
    wanted, given = tensors_of(example_inputs), tensors_of(inputs) if _is_inputs(inputs) else []
    if [(t.ndim, t.dtype) for t in given] != [(t.ndim, t.dtype) for t in wanted]:
        raise ConfigError(
            f"calibration batches are {describe_batch(content)}: their inputs must be like "
            f"example_inputs ({describe_batch(example_inputs)}); yield the inputs first"
        )
    return inputs


def _is_inputs(inputs: Any) -> bool:
    return isinstance(inputs, Tensor | tuple | list | dict)


def describe_batch(content: Any) -> str:
    """What a batch looks like, for messages."""
    if isinstance(content, Tensor):
        kind = "" if content.dtype == torch.float32 else f" of {str(content.dtype)[6:]}"
        return f"a tensor {tuple(content.shape)}{kind}"
    if isinstance(content, Mapping):
        return f"a dictionary with {', '.join(map(str, list(content)[:4]))}"
    if isinstance(content, list | tuple):
        inner = ", ".join(describe_batch(value) for value in content[:3])
        return f"a {type(content).__name__} of {inner}"
    return f"of type {type(content).__name__}"


def mean_loss(model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
    """The loss of a batch, with a gradient.

    Raises:
        ConfigError: A user's loss fails, or returns something else.
    """
    if loss is classify:
        return classify(model, batch.content)
    with users_code("the loss fails on a calibration batch"):
        value: Any = loss(model, batch.content)
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
        is_scalar = isinstance(value, Tensor) and value.numel() == 1
        found = "a tensor without a gradient" if is_scalar else describe_batch(value)
        raise ConfigError(
            f"the loss returns {found}: return the mean over the batch as one tensor, computed "
            "from the network's output with gradients"
        )
    return value.squeeze()


def run_batch(model: nn.Module, batch: Batch) -> None:
    """Passes a batch through a network, for what hooks take from it."""
    with users_code("the network fails on a calibration batch"), torch.inference_mode():
        call(model, batch.inputs)
