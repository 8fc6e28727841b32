"""The base network of a run: built, given its weights, told apart from others by their hash."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacp_ray.config.run import NUM_CHANNELS, ModelConfig, RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.preparation import hash_weights
from cacp_ray.io.schema import read_checked
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import (
    copy_weights,
    describe_weights,
    is_published,
    load_weights,
    read_weights,
)
from cacp_ray.rundir.schema import ModelFile

logger = logging.getLogger(__name__)

MOST_CHANNELS = 16  # the largest number that is tried


def load_model(config: ModelConfig, num_classes: int | None) -> nn.Module:
    """The base network in evaluation mode; None leaves its outputs as it has them.

    Raises:
        CacpError: The network or its weights cannot be had, or do not fit each other.
    """
    model = build_model(config.name, num_classes, config.kwargs)
    if config.weights is not None and is_published(config.name, config.weights):
        tensors = read_weights(config.name, config.weights)
        copy_weights(model, tensors, f"{config.weights} of {config.name}")
    elif config.weights is not None:
        load_weights(model, config.weights)
    return model.eval()


def check_output(model: nn.Module, image: Tensor, num_classes: int) -> None:
    """Refuses a network that gives no class scores, which the built-in task reads.

    Args:
        model: The network, in evaluation mode.
        image: (1, C, H, W), normalised.
        num_classes: Classes of the data.

    Raises:
        ConfigError: It returns something else than (1, num_classes), or takes other channels.
    """
    try:
        with torch.no_grad():
            output = model(image)
    except Exception:  # the network's own code
        check_channels(model, image)
        return  # making its plan tells what is wrong
    if isinstance(output, Tensor) and output.shape == (1, num_classes):
        return
    if isinstance(output, Tensor):
        given = f"a tensor of shape {tuple(output.shape)}"
    elif isinstance(output, Mapping):
        given = f"a dictionary with {', '.join(map(str, list(output)[:4]))}"
    else:
        given = f"a {type(output).__name__}"
    raise ConfigError(
        f"for one image, the network returns {given}: a search reads scores of shape "
        f"(1, {num_classes}), one for each class of the data; name a factory in model.name whose "
        "network returns them alone"
    )


def find_channels(model: nn.Module, image: Tensor) -> int | None:
    """Channels of the images that a network takes; those of `image` (1, C, H, W) are tried first.

    Returns:
        None where it runs on no number of channels.
    """
    for channels in (image.shape[1], *range(1, MOST_CHANNELS + 1)):
        try:
            with torch.no_grad():
                model(image[:, :1].repeat(1, channels, 1, 1))
        except Exception:  # the network's own code
            continue
        return channels
    return None


def check_channels(model: nn.Module, image: Tensor) -> None:
    """Refuses images (1, C, H, W) of other channels than a network takes.

    A network that runs on no number of channels passes: it has another fault.

    Raises:
        ConfigError: It takes another number of channels.
    """
    given, taken = image.shape[1], find_channels(model, image)
    if taken is None or taken == given:
        return
    if taken in NUM_CHANNELS:
        names = {1: "one number each, for gray images", 3: "three numbers each, for colours"}
        step = f"give them {names[taken]}, or name another network in model.name"
    else:
        step = "such images are the business of a task of your own (docs/tasks.md)"
    raise ConfigError(
        f"the first layer of the network takes {taken} channel{'s' * (taken > 1)}, and images have "
        f"{given} by data.mean and data.std: {step}"
    )


def rebuild_model(
    config: ModelConfig, num_classes: int | None, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The network of `load_model` on a node where its file of weights may be missing."""
    model = build_model(config.name, num_classes, config.kwargs)
    copy_weights(model, tensors, f"the base network {config.name}")
    return model.eval()


def make_rebuild(config: ModelConfig, num_classes: int | None) -> Callable[[], nn.Module]:
    """`rebuild_model` with the weights themselves, ready to be sent to other nodes."""
    tensors = load_model(config, num_classes).state_dict()
    return partial(rebuild_model, config, num_classes, tensors)


def check_weights(config: RunConfig, run_dir: Path) -> None:
    """Compares the base weights with those that a run was searched from; reads no image.

    Raises:
        ArtifactError: The hashes differ.
    """
    saved = read_checked(run_dir / "model.json", ModelFile, ("sha256",))
    classes = saved.get("classes")
    model = load_model(config.model, None if classes is None else len(classes))
    check_hash(hash_weights(model.state_dict()), saved, run_dir)


def describe_published(model: ModelConfig) -> str:
    """The published accuracy of the weights, for comparison; empty where there is none."""
    if model.weights is None or not is_published(model.name, model.weights):
        return ""
    published = describe_weights(model.name, model.weights)
    if published.top1 is None:
        return ""
    return f"; published top-1 {100 * published.top1:.2f} % on {published.data}"


def check_hash(sha256: str, saved: Mapping[str, Any], run_dir: Path) -> None:
    """Compares the hash of base weights with the one in the content of a run's model.json.

    Raises:
        ArtifactError: They differ.
    """
    if saved["sha256"] != sha256:
        raise ArtifactError(
            f"{run_dir} was searched from other weights than model.weights holds now: put them "
            "back or search again in another --run-dir"
        )
