"""Weights of networks: published ones by name, or files.

Names are those of torchvision (IMAGENET1K_V2 of `torchvision:resnet50`), which publishes transforms
and accuracy too, and `pretrained` of `timm:NAME`. Published weights are read from the cache of
torch.hub (TORCH_HOME) or of the Hugging Face hub (HF_HOME), and fetched where they are missing.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cacp_ray.errors import ArtifactError, ConfigError, nearest_names, one_line
from cacp_ray.io.files import read_tensors
from cacp_ray.models.checkpoints import find_state_dict, strip_prefix
from cacp_ray.models.factory import build_model, check_torchvision
from cacp_ray.models.recognition import recognise

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"  # name of a timm network's published weights
HUB_SECONDS = 5.0  # limit for a first answer of the Hugging Face hub
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # names of timm's weights, best first


@dataclass(frozen=True)
class Published:
    """Published facts about weights.

    Attributes:
        num_classes: Number of classes of the network.
        transforms: `mean`, `std`, `resize`, `crop` and `interpolation`, as in `data` of a
            configuration.
        top1: Accuracy in [0, 1]; None where it is not published.
        data: Name of the data set on which the accuracy was measured.
    """

    num_classes: int
    transforms: dict[str, Any]
    top1: float | None = None
    data: str = ""


def is_published(model: str, weights: str | None) -> bool:
    """Whether `weights` names published weights rather than a file."""
    if weights is None or Path(weights).suffix:
        return False
    return model.startswith(("torchvision:", "timm:")) and not weights.startswith("embedded:")


def describe_weights(model: str, weights: str) -> Published:
    """Published facts about the weights of a network, without fetching them.

    Raises:
        ConfigError: No weights of that name exist, or they have no classifier.
    """
    source, _, name = model.partition(":")
    if source == "timm":
        return _describe_timm(name, weights)
    entry = _find_torchvision(name, weights)
    preset = entry.transforms()
    metrics = entry.meta.get("_metrics", {})
    data = next(iter(metrics), "")
    top1 = metrics.get(data, {}).get("acc@1")
    return Published(
        len(entry.meta["categories"]),
        {
            "mean": tuple(preset.mean),
            "std": tuple(preset.std),
            "resize": preset.resize_size[0],
            "crop": preset.crop_size[0],
            "interpolation": preset.interpolation.value,
        },
        None if top1 is None else top1 / 100,
        data,
    )


def read_weights(model: str, weights: str) -> Mapping[str, Tensor]:
    """Tensors of published weights by name, from the cache or fetched.

    Raises:
        ConfigError: No weights of that name exist, or they have no classifier.
        ArtifactError: The weights cannot be fetched, or the file is broken.
    """
    source, _, name = model.partition(":")
    if source == "timm":
        return _read_timm(name, weights)
    url = _find_torchvision(name, weights).url
    file = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[-1]
    prefix = file.stem.rpartition("-")[-1]  # torchvision's names end with part of the sha256
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(url, str(file), prefix, progress=False)
        except (OSError, RuntimeError) as error:  # no connection, or another hash
            raise ArtifactError(
                f"weights {weights} of {model} are not at {file} and cannot be fetched ({error}): "
                f"fetch {url} where there is a network, and put it there"
            ) from error
    _check_hash(file, prefix)
    return read_pickle(file)


def _check_hash(file: Path, prefix: str) -> None:
    """Refuses a file whose content does not match the hash in its name, such as half a download."""
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"weights {file}: {error.strerror}; mend the file or set another TORCH_HOME"
        ) from error
    if not digest.startswith(prefix):
        raise ArtifactError(
            f"weights {file} were cut short or changed (their sha256 begins {digest[:8]}, not "
            f"{prefix}): delete the file to have it fetched again, or put a whole one there"
        )


def read_pickle(file: Path) -> Mapping[str, Tensor]:
    """A state dict that torch.save wrote; only tensors are unpickled.

    Raises:
        ArtifactError: The file holds something else, or cannot be read.
    """
    try:
        content = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken file
        raise ArtifactError(
            f"weights {file}: not a readable state dict ({one_line(error)[:200]}); save "
            "model.state_dict(), without other Python objects"
        ) from error
    return find_state_dict(content, str(file))


def _find_torchvision(name: str, weights: str) -> Any:
    from torchvision import models

    check_torchvision(name)
    entries = models.get_model_weights(name)
    names = [*(entry.name for entry in entries), "DEFAULT"]
    if weights not in names:
        raise ConfigError(
            f"torchvision:{name} has no weights {weights!r}: {nearest_names(weights, names)}; or "
            "give a .safetensors or .pth file"
        )
    if entries[weights].meta["categories"] is None:
        whole = [entry.name for entry in entries if entry.meta["categories"] is not None]
        raise ConfigError(
            f"weights {weights} of torchvision:{name} hold no classifier: give {' or '.join(whole)}"
        )
    return entries[weights]


def _describe_timm(name: str, weights: str) -> Published:
    if weights != PRETRAINED:
        raise ConfigError(
            f"timm:{name} has no weights {weights!r}: write {PRETRAINED}, or give a file"
        )
    settings: Any = build_model(f"timm:{name}", 1000).pretrained_cfg
    if not settings["num_classes"]:
        raise ConfigError(
            f"weights of timm:{name} are published without a classifier: give another network, or "
            "a file of weights that you trained"
        )
    crop = int(settings["input_size"][-1])
    return Published(
        int(settings["num_classes"]),
        {
            "mean": tuple(settings["mean"]),
            "std": tuple(settings["std"]),
            "resize": int(crop / settings.get("crop_pct", 0.875)),
            "crop": crop,
            "interpolation": settings["interpolation"],
        },
    )


def _read_timm(name: str, weights: str) -> Mapping[str, Tensor]:
    published = _describe_timm(name, weights)
    import timm  # type: ignore[import-untyped]

    settings = timm.get_pretrained_cfg(name)
    mode = getattr(settings, "crop_mode", None)
    if mode not in (None, "center"):
        logger.warning(
            "timm:%s was published for images prepared otherwise (crop mode %s); here they are "
            "cropped in the middle, so its accuracy will differ",
            name,
            mode,
        )
    hub_id = getattr(settings, "hf_hub_id", None)
    try:
        file = _find_in_hub(hub_id) if hub_id else None
        model: Any = timm.create_model(
            name,
            pretrained=True,
            num_classes=published.num_classes,
            pretrained_cfg_overlay=None if file is None else {"file": file, "custom_load": False},
        )
    except Exception as error:  # the hub's client raises many kinds
        reason = one_line(error)[:200]
        raise ArtifactError(
            f"weights of timm:{name} ({hub_id}) are not in the Hugging Face cache and cannot be "
            f"fetched ({reason}): fetch them where there is a network, or give a .safetensors file"
        ) from error
    return model.state_dict()


def _find_in_hub(hub_id: str) -> str | None:
    """File in the cache, which timm would not use without a network; None where it must be fetched.

    Raises:
        Exception: The hub does not answer this one request; timm would retry for a minute.
    """
    import huggingface_hub
    from huggingface_hub import constants

    repo, _, revision = hub_id.partition("@")
    for name in HUB_FILES:
        path = huggingface_hub.try_to_load_from_cache(
            repo, name, cache_dir=constants.HF_HUB_CACHE, revision=revision or None
        )
        if isinstance(path, str):
            return path
    huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    return None


def resolve_weights(path: str) -> Path:
    """Path of a weights file; `embedded:NAME` names a file that the package ships."""
    if path.startswith("embedded:"):
        folder = Path(str(resources.files("cacp_ray.models"))) / "weights"
        known = {file.stem: file for file in folder.glob("*.safetensors")}
        name = path.removeprefix("embedded:")
        if name not in known:
            raise ConfigError(f"no embedded weights {name!r}: {nearest_names(name, known)}")
        return known[name]
    return Path(path)


def load_weights(model: nn.Module, path: str) -> None:
    """Copies a file of weights into `model`, as `copy_weights` does.

    Heads that the network was built without are skipped, such as `AuxLogits` of torchvision's
    inception_v3, which only training needs. Their attribute of the model is None.

    Raises:
        ArtifactError: The file is missing or unreadable, or keys, shapes or values do not fit.
    """
    file = resolve_weights(path)
    if not file.is_file():
        raise ArtifactError(
            f"weights {file}: no such file; give the path of a .safetensors or .pth file"
        )
    tensors = read_pickle(file) if file.suffix in (".pth", ".pt") else read_tensors(file)
    copy_weights(model, strip_prefix(tensors, model.state_dict().keys(), str(file)), str(file))


def copy_weights(model: nn.Module, tensors: Mapping[str, Tensor], file: str) -> None:
    """Copies the tensors of `file` into `model`; every key and shape must fit.

    Raises:
        ArtifactError: Keys, shapes or values do not fit.
    """
    absent = {key for key in tensors if getattr(model, key.partition(".")[0], model) is None}
    tensors = {key: value for key, value in tensors.items() if key not in absent}
    own = model.state_dict()
    missing = sorted(own.keys() - tensors.keys())
    # Published files often leave out the BN batch counter, which affects nothing here.
    problems = [f"missing {key}" for key in missing if not key.endswith("num_batches_tracked")]
    problems += [f"unexpected {key}" for key in sorted(tensors.keys() - own.keys())]
    problems += [
        f"{key} has shape {tuple(tensors[key].shape)}, the model {tuple(own[key].shape)}"
        for key in sorted(own.keys() & tensors.keys())
        if own[key].shape != tensors[key].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        known = recognise(tensors)
        advice = f"{known}: set" if known else "check"
        raise ArtifactError(
            f"weights {file} do not fit the model: {'; '.join(problems[:4])}{more}; {advice} the "
            "model name and the number of classes"
        )
    broken = [key for key, value in tensors.items() if not torch.isfinite(value.float()).all()]
    if broken:
        raise ArtifactError(f"weights {file}: {broken[0]} holds NaN or infinity; train it again")
    model.load_state_dict(tensors, strict=False)
