"""Subnets on the Hugging Face Hub, with a model card made from what the run measured."""

import shutil
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from cacp_ray.config.saved import is_run
from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import write_text
from cacp_ray.io.hub import PREFIX, upload_folder
from cacp_ray.models.factory import GIVEN
from cacp_ray.pruning.subnet import loading_code, read_description
from cacp_ray.reporting.card import describe_rates, describe_subnet, write_card
from cacp_ray.rundir.directory import read_result
from cacp_ray.rundir.schema import ReportedFile

FILES = ("subnet.json", "model.safetensors", "finetuned.safetensors", "metrics.json")
FIGURES = ("accuracy.png", "benchmark.png")


def push(place: Path, repo: str, *, private: bool = False) -> str:
    """Uploads the subnets of a run, each as `rate-R`, or one subnet folder, with a model card.

    Weights, their descriptions and figures are uploaded; configuration and machine are not.

    Args:
        place: A run directory or a subnet folder.
        repo: `OWNER/NAME` on the Hub; it is made where it is missing.
        private: Whether a new repository is private.

    Returns:
        The address of the repository.

    Raises:
        ArtifactError: The place holds no subnets, or cannot be uploaded.
        ConfigError: huggingface_hub is not installed, or the name is none of the Hub.
    """
    with tempfile.TemporaryDirectory() as temporary:
        staged = Path(temporary)
        if (place / "subnet.json").exists():
            _stage_subnet(place, repo, staged)
        elif is_run(place):
            _stage_run(place, repo, staged)
        else:
            raise ArtifactError(f"{place} is no run and no subnet folder: give one of these")
        message = f"Upload by cacp-ray {metadata.version('cacp-ray')}"
        return upload_folder(staged, repo, private=private, message=message)


def _stage_subnet(folder: Path, repo: str, staged: Path) -> None:
    description = _copy(folder, staged)
    card = write_card(
        repo,
        description,
        describe_subnet(description, (folder / "finetuned.safetensors").exists()),
        loading_code(PREFIX + repo, description["model"]),
        figures=(),
    )
    write_text(staged / "README.md", card)


def _stage_run(run_dir: Path, repo: str, staged: Path) -> None:
    result: dict[str, Any] = read_result(run_dir, ReportedFile)
    folders = [run_dir / row["path"] for row in result["rates"]]
    descriptions = [_copy(folder, staged / folder.name) for folder in folders]
    figures = [name for name in FIGURES if (run_dir / "figures" / name).exists()]
    for name in figures:
        shutil.copy(run_dir / "figures" / name, staged / name)
    place = f"{PREFIX}{repo}/{folders[-1].name}"
    card = write_card(
        repo,
        descriptions[0],
        describe_rates(result),
        loading_code(place, result["base"]["model"]),
        figures=figures,
    )
    write_text(staged / "README.md", card)


def _copy(folder: Path, out: Path) -> dict[str, Any]:
    """Copies the files of a subnet; returns the description of its network."""
    description = read_description(folder, "rate", "cost_kept", "macs", "params")
    if description["model"].startswith(GIVEN):
        raise ArtifactError(
            f"{folder}: its network was given as an object in Python, and nobody else could build "
            "it: search it by name (model.name: package.module:factory)"
        )
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (folder / name).exists():
            shutil.copy(folder / name, out / name)
    return read_description(folder, is_finetuned=(folder / "finetuned.safetensors").exists())
