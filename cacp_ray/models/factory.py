"""Networks by name, and their weights from safetensors files.

A model name is one of: a built-in CIFAR network (`resnet20`), `torchvision:NAME`, `timm:NAME`, or
`package.module:function`, a factory of the user's own that is called with `num_classes`.
"""

import importlib
from collections.abc import Callable, Mapping
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from cacp_ray.errors import ArtifactError, ConfigError, UnsupportedModelError, nearest_names
from cacp_ray.models.cifar import CifarResNet, CifarVGG16
from cacp_ray.models.pretrained import read_pickle

CIFAR_MODELS = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg16": CifarVGG16,
}
IMAGENET_SOURCES = ("torchvision", "timm")
AUXILIARY_HEADS = ("googlenet", "inception_v3")  # of torchvision: heads that only training runs


def build_model(name: str, num_classes: int) -> nn.Module:
    """A network with fresh weights.

    Raises:
        ConfigError: The name is unknown, or the factory cannot be imported.
        UnsupportedModelError: The factory did not return an `nn.Module`.
    """
    source, _, rest = name.partition(":")
    if not rest:
        if name.endswith(":") and source in IMAGENET_SOURCES:
            raise ConfigError(f"model {name!r} names no network: write {source}:NAME")
        if name not in CIFAR_MODELS:
            raise ConfigError(f"unknown model {name!r}: {nearest_names(name, CIFAR_MODELS)}")
        return CIFAR_MODELS[name](num_classes=num_classes)
    if source == "torchvision":
        return _build_torchvision(rest, num_classes)
    if source == "timm":
        return _build_timm(rest, num_classes)
    return _build_from_factory(name, num_classes)


def default_num_classes(name: str) -> int:
    """1000 for torchvision and timm, 10 for the CIFAR networks and a user's own factory."""
    return 1000 if name.partition(":")[0] in IMAGENET_SOURCES else 10


def default_input_shape(name: str, model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network of this name is made for."""
    if ":" not in name:
        return (3, 32, 32)
    if name == "torchvision:inception_v3":
        return (3, 299, 299)
    described = getattr(model, "pretrained_cfg", None) or {}  # timm's
    channels, height, width = described.get("input_size", (3, 224, 224))
    return (channels, height, width)


def import_function(kind: str, name: str) -> Callable[..., Any]:
    """A function of the user's own.

    Args:
        kind: What it is for, as errors call it.
        name: `package.module:function`.

    Raises:
        ConfigError: It cannot be imported, or cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"{kind} {name!r} cannot be imported ({_in_one_line(error)}): write "
            "package.module:function and make sure that the package is installed or on PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(
            f"{kind} {name!r} is a {type(found).__name__}, not a function: write "
            "package.module:function"
        )
    return found


def _build_from_factory(name: str, num_classes: int) -> nn.Module:
    factory = import_function("model", name)
    try:
        model = factory(num_classes=num_classes)
    except Exception as error:  # whatever the user's function raises
        raise ConfigError(
            f"model {name!r} cannot be built ({_in_one_line(error)}): it must take "
            f"num_classes={num_classes} and return the network"
        ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{name} returned {type(model).__name__}: the factory must return a torch.nn.Module"
        )
    return model


def _in_one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _build_torchvision(name: str, num_classes: int) -> nn.Module:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}: {nearest_names(name, known)}")
    # What training alone runs has no place in a cost; `load_weights` leaves its tensors out.
    extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY_HEADS else {}
    return models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _build_timm(name: str, num_classes: int) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"model timm:{name} needs timm: pip install 'cacp-ray[timm]'") from error
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: {nearest_names(name, timm.list_models())}")
    return timm.create_model(name, num_classes=num_classes)


def resolve_weights(path: str) -> Path:
    """A weights file on disk; `embedded:NAME` names one that the package ships."""
    if path.startswith("embedded:"):
        folder = Path(str(resources.files("cacp_ray.models"))) / "weights"
        known = {file.stem: file for file in folder.glob("*.safetensors")}
        name = path.removeprefix("embedded:")
        if name not in known:
            raise ConfigError(f"no embedded weights {name!r}: {nearest_names(name, known)}")
        return known[name]
    return Path(path)


def load_weights(model: nn.Module, path: str) -> None:
    """Copies a file of weights into `model`; every key and shape must fit.

    Heads that the network was built without (`AuxLogits` of torchvision's inception_v3, which only
    training runs) are left out; their attribute of the model is None.

    Raises:
        ArtifactError: The file is missing or unreadable, or keys, shapes or values do not fit.
    """
    file = resolve_weights(path)
    if not file.is_file():
        raise ArtifactError(
            f"weights {file}: no such file; give the path of a .safetensors or .pth file"
        )
    if file.suffix in (".pth", ".pt"):
        copy_weights(model, read_pickle(file), str(file))
        return
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"weights {file}: not a readable safetensors file ({error})") from error
    copy_weights(model, tensors, str(file))


def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor], file: str) -> None:
    """Copies tensors into `model`; every key and shape must fit, see `load_weights`.

    Raises:
        ArtifactError: Keys, shapes or values do not fit; it names `file`.
    """
    absent = {key for key in tensors if getattr(model, key.partition(".")[0], model) is None}
    tensors = {key: value for key, value in tensors.items() if key not in absent}
    own = model.state_dict()
    # Published files of this naming often leave the BN batch counter out; it affects nothing here.
    missing = sorted(
        k for k in own.keys() - tensors.keys() if not k.endswith("num_batches_tracked")
    )
    problems = [f"missing {key}" for key in missing]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise ArtifactError(
            f"weights {file} do not fit the model: {'; '.join(problems[:4])}{more}; "
            "check the model name and the number of classes"
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ArtifactError(f"weights {file}: {broken[0]} holds NaN or infinity; train it again")
    model.load_state_dict(tensors, strict=False)
