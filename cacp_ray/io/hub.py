"""Subnet folders on the Hugging Face Hub: JSON and safetensors alone are read, never pickles."""

# pyright: basic
# Basic: huggingface_hub is imported where it is needed, and need not be installed.

import re
from pathlib import Path
from typing import Any

from cacp_ray.errors import ArtifactError, ConfigError, first_line

PREFIX = "hf://"
READ = ("*.json", "*.safetensors")
_NAME = r"\w[\w.-]*/\w[\w.-]*"  # OWNER/REPO
_PLACE = re.compile(rf"hf://({_NAME}?)(?:@([\w.-]+))?(?:/((?!.*\.\.)[\w./-]+?))?/?")


def import_hub() -> Any:
    """The package `huggingface_hub`.

    Raises:
        ConfigError: It is not installed.
    """
    try:
        import huggingface_hub
    except ImportError as error:
        raise ConfigError(
            "the Hugging Face Hub needs huggingface_hub: pip install 'cacp-ray[hub]'"
        ) from error
    return huggingface_hub


def fetch_folder(place: str) -> Path:
    """Downloads a folder into the Hub's cache; what lies there is not downloaded again.

    Args:
        place: `hf://OWNER/REPO`, `hf://OWNER/REPO/FOLDER` or `hf://OWNER/REPO@REVISION/FOLDER`.

    Raises:
        ConfigError: The place has another form, or huggingface_hub is not installed.
        ArtifactError: It cannot be downloaded, or has no such folder.
    """
    found = _PLACE.fullmatch(place)
    if found is None:
        raise ConfigError(f"{place}: write hf://OWNER/REPO, or hf://OWNER/REPO@REVISION/FOLDER")
    repo, revision, folder = found.groups()
    patterns = [f"{folder}/{name}" if folder else name for name in READ]
    try:
        top = import_hub().snapshot_download(repo, revision=revision, allow_patterns=patterns)
    except ConfigError:
        raise
    except Exception as error:  # of the network, of access, of names
        raise ArtifactError(
            f"{place} cannot be downloaded ({type(error).__name__}: {first_line(error)[:200]}): "
            "check the name, the network, and `hf auth login` for a private one"
        ) from error
    path = Path(top) / (folder or "")
    if not path.is_dir():
        raise ArtifactError(f"{place}: the repository has no such folder")
    return path


def upload_folder(folder: Path, repo: str, *, private: bool, message: str) -> str:
    """Uploads the content of a folder to a model repository, which is made where it is missing.

    Returns:
        Its address.

    Raises:
        ConfigError: huggingface_hub is not installed, or the name is none of the Hub.
        ArtifactError: It cannot be uploaded.
    """
    if not re.fullmatch(_NAME, repo):
        raise ConfigError(f"{repo}: write OWNER/REPO, the name of a model on the Hub")
    hub = import_hub()
    try:
        api = hub.HfApi()
        address = str(api.create_repo(repo, private=private, exist_ok=True))
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    except Exception as error:
        raise ArtifactError(
            f"{repo} cannot be uploaded ({type(error).__name__}: {first_line(error)[:200]}): check "
            "the network, the name, and `hf auth login`"
        ) from error
    return address
