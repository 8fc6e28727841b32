"""Published weights by name: IMAGENET1K_V2 of `torchvision:resnet50`, `pretrained` of `timm:NAME`.

torchvision's come with the transforms and the accuracy of their own evaluation. Weights are read
from the cache of torch.hub (TORCH_HOME) or of the Hugging Face hub (HF_HOME), and fetched where
they are not there.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cacp_ray.errors import ArtifactError, ConfigError, nearest_names

logger = logging.getLogger(__name__)

PRETRAINED = "pretrained"  # of timm: a network's own published weights
HUB_SECONDS = 5.0  # that the Hugging Face hub has to answer at all
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's weights, the first that is there


@dataclass(frozen=True)
class Published:
    """What is published about weights.

    Attributes:
        num_classes: Of the network.
        transforms: `mean`, `std`, `resize`, `crop` and `interpolation`, as in `data` of a
            configuration.
        top1: Accuracy in [0, 1]; None where it is not published.
        data: That the accuracy is of.
    """

    num_classes: int
    transforms: dict[str, Any]
    top1: float | None
    data: str


def is_published(model: str, weights: str | None) -> bool:
    """Whether `weights` is a name of published ones, no file."""
    if weights is None or Path(weights).suffix:
        return False
    return model.startswith(("torchvision:", "timm:")) and not weights.startswith("embedded:")


def describe_weights(model: str, weights: str) -> Published:
    """What is published about the weights of a network, without fetching them.

    Raises:
        ConfigError: There are none of that name, or they have no classifier.
    """
    source, _, name = model.partition(":")
    if source == "timm":
        return _describe_timm(name, weights)
    found = _find_torchvision(name, weights)
    preset = found.transforms()
    metrics = found.meta.get("_metrics", {})
    data = next(iter(metrics), "")
    top1 = metrics.get(data, {}).get("acc@1")
    return Published(
        len(found.meta["categories"]),
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
    """The tensors of published weights, from the cache or fetched.

    Raises:
        ConfigError: As of `describe_weights`.
        ArtifactError: They are not in the cache and cannot be fetched, or the file is broken.
    """
    source, _, name = model.partition(":")
    if source == "timm":
        return _read_timm(name, weights)
    found = _find_torchvision(name, weights)
    file = Path(torch.hub.get_dir()) / "checkpoints" / found.url.rsplit("/", 1)[-1]
    prefix = file.stem.rpartition("-")[-1]  # of the sha256, in all of torchvision's names
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(found.url, str(file), prefix, progress=False)
        except (OSError, RuntimeError) as error:  # urllib's, and that of another hash
            raise ArtifactError(
                f"weights {weights} of {model} are not at {file} and cannot be fetched ({error}): "
                f"fetch {found.url} where there is a network, and put it there"
            ) from error
    _check_hash(file, prefix)
    return read_pickle(file)


def _check_hash(file: Path, prefix: str) -> None:
    """Refuses a file that is not what its name says, as of a download that was cut short."""
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"weights {file}: {error.strerror}; mend the file or set another TORCH_HOME"
        ) from error
    if not found.startswith(prefix):
        raise ArtifactError(
            f"weights {file} were cut short or changed (their sha256 begins {found[:8]}, not "
            f"{prefix}): delete the file to have it fetched again, or put a whole one there"
        )


def read_pickle(file: Path) -> Mapping[str, Tensor]:
    """A state dict that torch.save wrote; nothing but tensors is unpickled.

    Raises:
        ArtifactError: The file holds something else, or cannot be read.
    """
    try:
        found = torch.load(file, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises many kinds for a broken file
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(f"weights {file}: not a readable state dict ({reason})") from error
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ArtifactError(f"weights {file}: holds no state dict; save model.state_dict()")
    return found


def _find_torchvision(name: str, weights: str) -> Any:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ConfigError(f"torchvision has no model {name!r}: {nearest_names(name, known)}")
    kinds = models.get_model_weights(name)
    names = [*(each.name for each in kinds), "DEFAULT"]
    if weights not in names:
        raise ConfigError(
            f"torchvision:{name} has no weights {weights!r}: {nearest_names(weights, names)}; or "
            "give a .safetensors or .pth file"
        )
    if kinds[weights].meta["categories"] is None:
        whole = [each.name for each in kinds if each.meta["categories"] is not None]
        raise ConfigError(
            f"weights {weights} of torchvision:{name} hold no classifier: give {' or '.join(whole)}"
        )
    return kinds[weights]


def _describe_timm(name: str, weights: str) -> Published:
    from cacp_ray.models.factory import build_model

    if weights != PRETRAINED:
        raise ConfigError(
            f"timm:{name} has no weights {weights!r}: write {PRETRAINED}, or give a file"
        )
    described: Any = build_model(f"timm:{name}", 1000).pretrained_cfg
    if not described["num_classes"]:
        raise ConfigError(
            f"weights of timm:{name} are published without a classifier: give another network, or "
            "a file of weights that you trained"
        )
    crop = int(described["input_size"][-1])
    return Published(
        int(described["num_classes"]),
        {
            "mean": tuple(described["mean"]),
            "std": tuple(described["std"]),
            "resize": int(crop / described.get("crop_pct", 0.875)),
            "crop": crop,
            "interpolation": described["interpolation"],
        },
        None,
        "",
    )


def _read_timm(name: str, weights: str) -> Mapping[str, Tensor]:
    published = _describe_timm(name, weights)
    import timm  # type: ignore[import-untyped]

    described = timm.get_pretrained_cfg(name)
    mode = getattr(described, "crop_mode", None)
    if mode not in (None, "center"):
        logger.warning(
            "timm:%s was published for images prepared otherwise (crop mode %s); here they are "
            "cropped in the middle, so its accuracy will differ",
            name,
            mode,
        )
    hub_id = getattr(described, "hf_hub_id", None)
    try:
        file = _find_in_hub(hub_id) if hub_id else None
        model: Any = timm.create_model(
            name,
            pretrained=True,
            num_classes=published.num_classes,
            pretrained_cfg_overlay=None if file is None else {"file": file, "custom_load": False},
        )
    except Exception as error:  # of the hub's client: many kinds
        reason = " ".join(str(error).split())[:200]
        raise ArtifactError(
            f"weights of timm:{name} ({hub_id}) are not in the Hugging Face cache and cannot be "
            f"fetched ({reason}): fetch them where there is a network, or give a .safetensors file"
        ) from error
    return model.state_dict()


def _find_in_hub(hub_id: str) -> str | None:
    """The file in the cache, which timm would not take without a network; None: to be fetched.

    Raises:
        Exception: The hub does not answer; asked once, as timm tries for a minute and prints it.
    """
    import huggingface_hub
    from huggingface_hub import constants

    repo, _, revision = hub_id.partition("@")
    for name in HUB_FILES:
        found = huggingface_hub.try_to_load_from_cache(
            repo, name, cache_dir=constants.HF_HUB_CACHE, revision=revision or None
        )
        if isinstance(found, str):
            return found
    huggingface_hub.get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    return None
