"""Subnet folders: JSON and safetensors, no pickle.

`subnet.json` names the base model and the channels that were kept; `model.safetensors` holds the
small tensors. `load_subnet` builds the base network by its factory and puts the tensors in place.
"""

import copy
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from torch import Tensor, nn

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.code import code_folders
from cacp_ray.io.files import (
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from cacp_ray.io.hub import PREFIX, fetch_folder
from cacp_ray.io.rates import format_rate
from cacp_ray.io.schema import (
    Classes,
    Content,
    Count,
    Name,
    Rate,
    Score,
    Size,
    check_content,
    version_of,
)
from cacp_ray.models.factory import GIVEN, build_model, check_origin, is_known, package_of
from cacp_ray.pruning.arguments import Dtype, read_arguments
from cacp_ray.pruning.inputs import check_network
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.surgery import Orders, all_tensors

SCHEMA_VERSION = 1
MAX_INPUT = 2**28  # values of all inputs: 1 GiB
Side = Annotated[int, Field(ge=1, le=MAX_INPUT)]
README = """# Subnet at rate {rate} ({cost_kept:.2%} of the {cost} of {name} kept)

```python
{code}  # the fine-tuned weights where there are some
```

`subnet.json` says which channels of which group were kept; `model.safetensors` holds the weights
{when}, `finetuned.safetensors` (with `metrics.json`) those after fine-tuning. The
{shapes}, {scale}.
"""


def describe_kept(plan: Plan, orders: Orders, keep_counts: Sequence[int]) -> list[dict[str, Any]]:
    """Members and kept channels of every group: original indices in the subnet's order."""
    return [
        {
            "name": group.name,
            "members": list(group.members),
            "num_channels": group.num_channels,
            "kept": [int(channel) for channel in order[:count]],
        }
        for group, order, count in zip(plan.groups, orders, keep_counts, strict=True)
    ]


def save_subnet(folder: Path, model: nn.Module, description: Mapping[str, Any]) -> None:
    """Writes model.safetensors and README.md, then subnet.json, which makes the folder complete.

    Args:
        folder: Subnet folder; it is made when missing.
        model: The small network.
        description: Content of subnet.json without the version: model, num_classes, input_shape,
            inputs (`describe_inputs`), base_sha256, cost, rate, cost_kept, keep_counts, groups,
            macs, params and accuracies.
    """
    write_tensors(folder / "model.safetensors", all_tensors(model))
    code = loading_code(folder, description["model"])
    is_own = description.get("task") is not None
    scale = "as your task has it" if is_own else "scaled to [0, 1] and normalised as in training"
    if description.get("inputs"):
        shapes = f"inputs are {', '.join(map(str, read_arguments(description)))}"
    else:
        shapes = f"input is {tuple(description['input_shape'])}"
    facts = {
        "rate": format_rate(description["rate"]),
        "cost_kept": description["cost_kept"],
        "cost": description["cost"].replace("macs", "MACs"),
        "name": description["model"].removeprefix(GIVEN),
        "when": "after the search" if description.get("search") else "as they were cut or repaired",
    }
    text = README.format(**facts, code=code, shapes=shapes, scale=scale)
    write_text(folder / "README.md", text)
    write_json(folder / "subnet.json", {"schema_version": SCHEMA_VERSION} | dict(description))


def loading_code(folder: Path | str, model: str) -> str:
    """Lines of Python that load a subnet of a network of this name."""
    place = folder if isinstance(folder, str) else folder.as_posix()
    path = json.dumps(place, ensure_ascii=False)
    package = package_of(model)
    imports = ["import cacp_ray", *([f"import {package}"] if package else [])]
    whole = ", model=whole_network" if model.startswith(GIVEN) else ""
    return "\n".join([*imports, f"net = cacp_ray.load_subnet({path}{whole})"])


@dataclass(frozen=True)
class SubnetFiles:
    """What a subnet folder holds: enough to build its network on another machine."""

    folder: Path
    description: dict[str, Any]
    tensors: dict[str, Tensor]
    file: Path  # of the tensors


class KeptGroup(Content):
    """A group of a subnet, with the channels of the base network that it kept."""

    name: Name
    num_channels: Size
    kept: list[Annotated[int, Field(ge=0, lt=10**6)]] | None = None


class DescribedInput(Content):
    """An argument of the network; one without shape and dtype is no tensor."""

    name: Name | None = None
    shape: Annotated[list[Side], Field(max_length=8)] | None = None
    dtype: Dtype | None = None
    is_batch: bool = True

    @model_validator(mode="after")
    def _is_whole(self) -> "DescribedInput":
        if (self.shape is None) != (self.dtype is None):
            raise ValueError("a shape and a dtype go together")
        return self


class Scores(Content):
    """Accuracies of a search."""

    score: Score | None = None
    policy_score: Score | None = None
    search_score: Score | None = None


class Description(Content):
    """subnet.json, as far as it is read."""

    model: Name
    num_classes: Classes | None = None
    kwargs: dict[str, Any] | None = None
    task: Name | None = None
    input_shape: Annotated[list[Size], Field(max_length=5)] | None = None
    inputs: Annotated[list[DescribedInput], Field(min_length=1, max_length=100)] | None = None
    classes: list[str] | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    rate: Rate | None = None
    cost_kept: Rate | None = None
    groups: list[KeptGroup] | None = None
    search: Scores = Scores()
    candidates: Scores = Scores()
    macs: Count | None = None
    params: Count | None = None

    @model_validator(mode="after")
    def _has_inputs(self) -> "Description":
        inputs = self.inputs or ()
        if self.input_shape == [] and not inputs:
            raise ValueError("input_shape is empty")
        names = [each.name for each in inputs]
        if any(names) and (None in names or len(set(names)) < len(names)):
            raise ValueError("inputs have names of their own, or none has a name")
        described = sum(math.prod(each.shape or ()) for each in inputs)
        values = max(math.prod(self.input_shape or ()), described)
        if values > MAX_INPUT:
            raise ValueError(f"an input of {values:,} values; at most {MAX_INPUT:,} are built")
        return self


class Trained(Content):
    """metrics.json, as far as it says which network was trained."""

    subnet: dict[str, Any] | None = None


def read_description(folder: Path, *needed: str, is_finetuned: bool = False) -> dict[str, Any]:
    """The content of subnet.json, with these keys.

    Args:
        folder: Subnet folder.
        needed: Keys that have to be there.
        is_finetuned: Whether to describe the network of `finetuned.safetensors`, which keeps other
            channels where it was cut from a larger trained one (`subnet` in metrics.json).

    Raises:
        ArtifactError: The file is missing, is not JSON, has another version, or other content.
    """
    file = folder / "subnet.json"
    content = read_json(file)
    version = version_of(content, SCHEMA_VERSION)
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"{file}: schema version {str(version)[:20]}, this cacp_ray reads "
            f"{SCHEMA_VERSION}; use the cacp_ray that wrote it"
        )
    is_own = isinstance(content, dict) and "task" in content
    keys = needed if is_own else (*needed, "num_classes")
    description = check_content(file, content, Description, keys)
    metrics = folder / "metrics.json"
    if is_finetuned and metrics.exists():
        trained: dict[str, Any] | None
        trained = check_content(metrics, read_json(metrics), Trained).get("subnet")
        description = check_content(metrics, description | (trained or {}), Description, keys)
    return description


def load_subnet(
    folder: str | Path,
    *,
    finetuned: bool | None = None,
    trust: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """A plain network in evaluation mode.

    Args:
        folder: Subnet folder, such as `runs/NAME/subnets/rate-0.50`, or one on the Hugging Face
            Hub, such as `hf://OWNER/REPO/rate-0.50` (`cacp-ray push`).
        finetuned: Whether to read the fine-tuned weights; None reads them where there are some.
        trust: Whether to import whatever module `subnet.json` names for the network, and call its
            function. Otherwise networks of cacp_ray, torchvision and timm load, and those whose
            package the caller has imported. Code that lies in the folder is never taken.
        model: The whole network, for a search that was given it as an object; it is not changed.

    Raises:
        ArtifactError: The folder is incomplete, cannot be downloaded, or its files do not fit each
            other.
        ConfigError: The model's factory is not trusted, or cannot be imported, or `model` is no
            network.
    """
    folder = fetch_folder(str(folder)) if str(folder).startswith(PREFIX) else Path(folder)
    return build_network(read_subnet(folder, finetuned=finetuned), trust=trust, model=model)


def read_subnet(folder: Path, *, finetuned: bool | None = None) -> SubnetFiles:
    """The files of a subnet folder, see `load_subnet`.

    Raises:
        ArtifactError: The folder is incomplete.
    """
    use_finetuned = (folder / "finetuned.safetensors").exists() if finetuned is None else finetuned
    description = read_description(folder, is_finetuned=use_finetuned)
    file = folder / ("finetuned.safetensors" if use_finetuned else "model.safetensors")
    return SubnetFiles(folder, description, read_tensors(file), file)


def build_network(
    files: SubnetFiles, *, trust: bool = False, model: nn.Module | None = None
) -> nn.Module:
    """The network of a subnet's files, see `load_subnet`.

    Raises:
        ArtifactError: The files do not fit each other.
        ConfigError: The model's factory is not trusted, or cannot be imported, or `model` is no
            network.
    """
    description, tensors, file = files.description, files.tensors, files.file
    name = description["model"]
    if model is not None:
        whole = copy.deepcopy(check_network(model)).cpu()
    else:
        whole = _build_whole(files.folder, description, trust=trust)
    wrong = sorted(all_tensors(whole).keys() ^ tensors.keys())
    if wrong:
        raise ArtifactError(f"{file}: does not fit {name} ({wrong[0]}); has its code changed?")
    small = ResizableNetwork(whole).load(tensors)
    # Weights of any widths load, so their number must show whether they are another subnet's.
    params = sum(parameter.numel() for parameter in small.parameters())
    if params != description.get("params", params):
        raise ArtifactError(
            f"{file}: {params:,} parameters, subnet.json says {description['params']}: a file of "
            "another subnet? Restore the folder or search again"
        )
    for parameter in small.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return small.eval()


def _build_whole(folder: Path, description: Mapping[str, Any], *, trust: bool) -> nn.Module:
    """The whole network of a subnet, by the name in its description."""
    name = description["model"]
    if name.startswith(GIVEN):
        raise ConfigError(
            f"{folder}: its network ({name.removeprefix(GIVEN)}) was given as an object in Python: "
            "call load_subnet or export in Python, with model= the whole network"
        )
    run = folder.absolute().parents[1:2] if folder.absolute().parent.name == "subnets" else ()
    check_origin(name, folder, *run, *code_folders())
    if not trust and not is_known(name):
        raise ConfigError(
            f"{folder} names {name} for its network, of no package of yours that is imported: "
            f"`import {package_of(name)}` first if that is yours, or load_subnet(..., "
            "trust=True)"
        )
    return build_model(name, description.get("num_classes"), description.get("kwargs"))
