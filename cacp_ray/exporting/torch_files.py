"""Files that PyTorch reads: programs of `torch.export`, and state dicts as safetensors."""

import copy
import io
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import nn

from cacp_ray.exporting.source import (
    NOTE,
    Network,
    Source,
    dynamic_shapes,
    exporting,
    make_example,
    split,
)
from cacp_ray.pruning.inputs import call


def write_program(source: Source, path: Path) -> None:
    """Writes a `torch.export` program with its weights; `torch.export.load(path).module()` runs it.

    It is called as the network is, and returns what the network returns.

    Raises:
        UnsupportedModelError: torch.export cannot follow the network, or save what it returns.
    """
    model, arguments = source.net, source.arguments
    example = make_example(arguments)
    args, kwargs = split(example)
    with exporting("torch.export", arguments):
        program = torch.export.export(
            model, args, kwargs, dynamic_shapes=dynamic_shapes(model, example, arguments)
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # local source paths
        written = io.BytesIO()  # torch accepts only paths that end in .pt2
        torch.export.save(program, written, extra_files={f"{NOTE}.json": source.note})
    path.write_bytes(written.getvalue())


def read_program(path: Path, model: nn.Module) -> Network:
    """Reads a `torch.export` program."""
    with path.open("rb") as file:
        return partial(call, torch.export.load(file).module())


def write_state_dict(source: Source, path: Path) -> None:
    """Writes the state dict as safetensors; a tied weight is stored under each of its names."""
    # Copies, because safetensors refuses tensors that share memory; its save_file would let only
    # the owner read the file.
    tensors = {
        name: value.detach().clone(memory_format=torch.contiguous_format)
        for name, value in source.net.state_dict().items()
    }
    path.write_bytes(save(tensors, metadata={NOTE: source.note}))


def read_state_dict(path: Path, model: nn.Module) -> Network:
    """A copy of the network with the tensors of the file."""
    network = copy.deepcopy(model)
    network.load_state_dict(load(path.read_bytes()), strict=True)
    return partial(call, network)
