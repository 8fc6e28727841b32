"""Networks by name.

A name is a built-in CIFAR network (`resnet20`), `torchvision:NAME`, `timm:NAME`, or
`package.module:function`: a factory of the user's own, called with `num_classes` if it takes that.
"""

import importlib
import importlib.util
import inspect
import os
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from torch import nn

from cacp_ray.errors import (
    ConfigError,
    UnsupportedModelError,
    is_out_of_memory,
    nearest_names,
)
from cacp_ray.io.code import code_folders
from cacp_ray.models.cifar import CifarResNet, CifarVGG16, PaddedCifarResNet

DEPTHS = (20, 32, 44, 56, 110)
CIFAR_MODELS: dict[str, Callable[..., nn.Module]] = {
    **{f"resnet{depth}": partial(CifarResNet, depth) for depth in DEPTHS},
    **{f"resnet{depth}_padding": partial(PaddedCifarResNet, depth) for depth in DEPTHS},
    "vgg16": CifarVGG16,
}
IMAGENET_SOURCES = ("torchvision", "timm")
SOURCES = (*IMAGENET_SOURCES, "python")
GIVEN = "python:"  # in the names of networks that were given as objects
AUXILIARY_HEADS = ("googlenet", "inception_v3")  # torchvision's, with heads for training only


def build_model(
    name: str, num_classes: int | None = None, kwargs: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network with fresh weights.

    Args:
        name: See above.
        num_classes: Outputs of a classifier; None leaves them as the network has them.
        kwargs: Further arguments of the network's function.

    Raises:
        ConfigError: The name is unknown, or the factory cannot be imported.
        UnsupportedModelError: The factory did not return an `nn.Module`.
    """
    given = dict(kwargs or {})
    if num_classes is not None:
        given = {"num_classes": num_classes} | given
    if name.startswith(GIVEN):
        raise ConfigError(
            f"the network {name.removeprefix(GIVEN)} was given as an object in Python: give it "
            "again (model=...)"
        )
    source, _, rest = name.partition(":")
    if not rest:
        if name.endswith(":") and source in IMAGENET_SOURCES:
            raise ConfigError(f"model {name!r} names no network: write {source}:NAME")
        if name not in CIFAR_MODELS:
            raise ConfigError(f"unknown model {name!r}: {_suggest(name)}")
        return _call(name, CIFAR_MODELS[name], {"num_classes": 10} | given)
    if source == "torchvision":
        return _build_torchvision(rest, given)
    if source == "timm":
        return _build_timm(rest, given)
    return _build_from_factory(name, given)


def _suggest(name: str) -> str:
    """Names near to one that is none of this package's networks."""
    for source in IMAGENET_SOURCES:
        if name in _list_models(source):
            return f"write {source}:{name}, or choose {', '.join(CIFAR_MODELS)}"
    return nearest_names(name, CIFAR_MODELS)


def _list_models(source: str) -> list[str]:
    """Names of a package's networks; none where it is not installed."""
    try:
        models = importlib.import_module(
            "torchvision.models" if source == "torchvision" else source
        )
    except ImportError:
        return []
    return models.list_models()


def default_num_classes(name: str) -> int:
    """1000 for torchvision and timm, 10 for the CIFAR networks and a user's own factory."""
    return 1000 if name.partition(":")[0] in IMAGENET_SOURCES else 10


def default_input_shape(name: str, model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) of the images that a network is made for."""
    if ":" not in name:
        return (3, 32, 32)
    if name == "torchvision:inception_v3":
        return (3, 299, 299)
    settings = getattr(model, "pretrained_cfg", None) or {}  # set by timm
    channels, height, width = settings.get("input_size", (3, 224, 224))
    return (channels, height, width)


def import_function(
    kind: str, name: str, *arguments: str, **keywords: object
) -> Callable[..., Any]:
    """Imports a user's `package.module:function`, to be called with these arguments.

    Args:
        kind: Purpose of the function, for messages.
        name: The function.
        arguments: Names of the positional arguments that it will be given.
        keywords: Its keyword arguments.

    Raises:
        ConfigError: The function cannot be imported, or does not take such arguments.
    """
    function = find_function(kind, name)
    try:
        inspect.signature(function).bind(*arguments, **keywords)
    except ValueError:  # written in C, and says nothing of its arguments
        pass
    except TypeError as error:
        # Positional arguments are ours, and keywords the user's own.
        rule = f"it must take ({', '.join(arguments)})"
        if not arguments and (keywords or kind == "model"):
            rule = f"it takes ({', '.join(_names_of(function))}); see model.kwargs"
        raise ConfigError(
            f"{kind} {name!r} cannot be called ({_describe(error)}): {rule}"
        ) from error
    return function


def find_function(kind: str, name: str) -> Callable[..., Any]:
    """Imports a user's `package.module:function`.

    Args:
        kind: Purpose of the function, for messages.
        name: The function.

    Raises:
        ConfigError: It cannot be imported, or is no function.
    """
    form = f"package.module:{'Class' if kind == 'task' else 'function'}"
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{kind} {name!r} cannot be imported: write {form}")
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's module raises
        raise ConfigError(
            f"{kind} {name!r} cannot be imported ({_describe(error)}): write {form}; the "
            "package must be installed, in the working directory, or beside the configuration"
        ) from error
    if not callable(function):
        wanted = "a class or a function without arguments" if kind == "task" else "a function"
        raise ConfigError(
            f"{kind} {name!r} is a {type(function).__name__}, not {wanted}: write {form}"
        )
    return function


def check_origin(name: str, *folders: Path) -> None:
    """Refuses a network or function whose code lies in the folders whose files name it.

    Python finds it there when it was started in such a folder. A link in the folder counts as code
    there. A module that was imported already is fine.

    Raises:
        ConfigError: The code lies in one of the folders.
    """
    module = name.partition(":")[0] if ":" in name else ""
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        part = ".".join(parts[:end])
        if not part or part in sys.modules:
            continue
        try:
            spec = importlib.util.find_spec(part)  # imports what is above it, checked before
        except (ImportError, ValueError, AttributeError):
            return  # importing it will say why
        if spec is None or spec.origin is None:
            continue  # a folder of packages without code of its own
        for folder in folders:
            if _lies_in(spec.origin, folder):
                raise ConfigError(
                    f"{folder} names {name}, and holds its code: a folder of results may not bring "
                    "code; import it yourself first, or move it elsewhere on PYTHONPATH"
                )


def import_beside(name: str) -> None:
    """Imports the module of a name that a user wrote, if it lies in one of their code folders."""
    module = package_of(name)
    if module is None or module in sys.modules:
        return
    with suppress(Exception):  # whatever the user's module raises, who uses it will say
        spec = importlib.util.find_spec(module)
        origin = None if spec is None else spec.origin
        if origin is not None and any(_lies_in(origin, folder) for folder in code_folders()):
            importlib.import_module(module)


def _lies_in(file: str, folder: Path) -> bool:
    """Whether a file lies in a folder, by its own path or by where links lead."""
    return Path(os.path.abspath(file)).is_relative_to(os.path.abspath(folder)) or (
        Path(file).resolve().is_relative_to(folder.resolve())
    )


def is_known(name: str) -> bool:
    """Whether a network of this name is ours, torchvision's, timm's, or of an imported module.

    Python's own modules and the packages that we import make no networks, and some of their
    functions had better not be called.
    """
    module, _, function = name.partition(":")
    if not function or module in SOURCES:
        return True
    package = module.partition(".")[0]
    return module in sys.modules and package not in sys.stdlib_module_names | _own_dependencies()


@cache
def _own_dependencies() -> frozenset[str]:
    """Names of the packages that this one needs, such as `torch`."""
    wanted = metadata.requires("cacp-ray") or ()
    return frozenset(re.split(r"[^\w.-]", line)[0].replace("-", "_") for line in wanted)


def package_of(name: str) -> str | None:
    """The module of a user's `package.module:function`; None for names that we know."""
    module, _, function = name.partition(":")
    return module if function and module not in SOURCES else None


def _call(name: str, function: Callable[..., Any], given: Mapping[str, Any]) -> Any:
    try:
        return function(**given)
    except Exception as error:  # whatever the function raises
        if is_out_of_memory(error):
            raise
        arguments = ", ".join(f"{key}={value!r}" for key, value in given.items())
        rule = f"it was given ({arguments}) and must return the network"
        if not all(_takes(function, key) for key in given):
            rule = f"it takes ({', '.join(_names_of(function))})"
        raise ConfigError(
            f"model {name!r} cannot be built ({_describe(error)}): {rule}; see model.kwargs"
        ) from error


def _build_from_factory(name: str, given: dict[str, Any]) -> nn.Module:
    function = find_function("model", name)
    if "num_classes" in given and not _takes(function, "num_classes"):
        given = {key: value for key, value in given.items() if key != "num_classes"}
    model = _call(name, import_function("model", name, **given), given)
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"{name} returned {type(model).__name__}: the factory must return a torch.nn.Module"
        )
    return model


def _describe(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _names_of(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments that a function takes."""
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(function).parameters.values()
    return [f"{stars.get(p.kind, '')}{p.name}" for p in parameters]


def _takes(function: Callable[..., Any], argument: str) -> bool:
    """Whether a function has an argument of this name, or any."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # written in C
        return True
    return any(p.name == argument or p.kind is p.VAR_KEYWORD for p in parameters)


def _build_torchvision(name: str, given: dict[str, Any]) -> nn.Module:
    from torchvision import models

    check_torchvision(name)
    # Heads for training only have no place in a cost; `load_weights` leaves their tensors out.
    extra = {"aux_logits": False, "init_weights": True} if name in AUXILIARY_HEADS else {}
    function = partial(models.get_model, name, weights=None)
    return _call(f"torchvision:{name}", function, extra | given)


def check_torchvision(name: str) -> None:
    """Raises a ConfigError where torchvision has no classifier of this name."""
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}: {nearest_names(name, known)}")


def _build_timm(name: str, given: dict[str, Any]) -> nn.Module:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ConfigError(f"model timm:{name} needs timm: pip install 'cacp-ray[timm]'") from error
    if not timm.is_model(name):
        raise ConfigError(f"timm has no model {name!r}: {nearest_names(name, timm.list_models())}")
    return _call(f"timm:{name}", partial(timm.create_model, name), given)
