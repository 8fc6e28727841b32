"""Fine-tuned weights in a subnet folder, with what they measured."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from cacp_ray.errors import ConfigError
from cacp_ray.io.files import read_tensors, write_json, write_tensors
from cacp_ray.io.numbers import read_numbers
from cacp_ray.io.schema import find_problem, read_checked
from cacp_ray.pruning.subnet import read_description
from cacp_ray.pruning.surgery import all_tensors
from cacp_ray.rundir.schema import MetricsFile

OURS = ("history", "recipe", "subnet", "variants")  # keys of metrics.json that are no numbers


def save_finetuned(folder: str | Path, net: nn.Module, metrics: Mapping[str, Any]) -> None:
    """Writes a subnet's weights after a training of one's own, and what it measured.

    `report`, `evaluate`, `export` and `load_subnet` then take them.

    Args:
        folder: Subnet folder, such as `runs/NAME/subnets/rate-0.50`.
        net: The network that `load_subnet` gave, trained.
        metrics: Numbers for metrics.json; `score` is that of the task, as its `score` returns it.

    Raises:
        ConfigError: `net` is another network or has weights that are NaN, or `metrics` has no
            finite `score`, or entries that are no finite numbers.
        ArtifactError: The folder holds no subnet.
    """
    numbers: dict[str, Any] = read_numbers("metrics", metrics)
    if "score" not in numbers:
        raise ConfigError("metrics needs the network's `score`, a finite number")
    if taken := sorted(numbers.keys() & set(OURS)):
        raise ConfigError(f"metrics: {taken[0]} is a name of our own: choose another")
    # Whole numbers stay whole, as counts of epochs and images are.
    numbers = {name: int(n) if n == math.trunc(n) else n for name, n in numbers.items()}
    subnet = _find_trained(Path(folder), net)
    content = numbers | {"score": float(numbers["score"])}
    write_finetuned(Path(folder), net, content | ({} if subnet is None else {"subnet": subnet}))


def _find_trained(folder: Path, net: Any) -> dict[str, Any] | None:
    """What metrics.json says of a network cut from a larger trained one, where `net` is that."""
    file, weights = folder / "metrics.json", folder / "finetuned.safetensors"
    if not (isinstance(net, nn.Module) and file.exists() and weights.exists()):
        return None
    subnet = read_checked(file, MetricsFile).get("subnet")
    return subnet if _shapes(all_tensors(net)) == _shapes(read_tensors(weights)) else None


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def write_finetuned(folder: Path, net: nn.Module, content: Mapping[str, Any]) -> None:
    """Writes finetuned.safetensors, then metrics.json with this content and its `score`.

    With `subnet` in the content, the network is the one that is there already, trained further;
    otherwise it is the search's.

    Raises:
        ConfigError: `net` is another network or has weights that are NaN, or the content does not
            fit a report.
        ArtifactError: The folder holds no subnet.
    """
    if not isinstance(net, nn.Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"the network is of type {type(net).__name__}: give a torch.nn.Module")
    read_description(folder)
    saved = "finetuned.safetensors" if "subnet" in content else "model.safetensors"
    tensors = all_tensors(net)
    shapes, wanted = _shapes(tensors), _shapes(read_tensors(folder / saved))
    if shapes != wanted:
        name = min(
            name for name in shapes.keys() | wanted.keys() if shapes.get(name) != wanted.get(name)
        )
        raise ConfigError(
            f"{folder} holds another network than the one given: {name} is {wanted.get(name)} "
            f"there and {shapes.get(name)} here; give the network that load_subnet made"
        )
    for name, parameter in net.named_parameters():
        if parameter.is_floating_point() and torch.isnan(parameter).any():
            raise ConfigError(f"{folder}: {name} of the trained network has NaN: train it anew")
    metrics = {**content, "search_score": content["score"]}
    if problem := find_problem(metrics, MetricsFile):
        raise ConfigError(f"metrics: {problem}: give what a report can show")
    write_tensors(folder / "finetuned.safetensors", tensors)
    write_json(folder / "metrics.json", metrics)
