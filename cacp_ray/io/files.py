"""Files that are whole or absent: everything is written to a temporary name, then renamed."""

import contextlib
import errno
import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cacp_ray.errors import ArtifactError

if TYPE_CHECKING:
    from torch import Tensor


logger = logging.getLogger(__name__)
PATIENCE_SECONDS = 120.0
RETRY_SECONDS = 1.0


def write_file(path: Path, write: Callable[[Path], object]) -> None:
    """Calls `write` with a temporary path in the same folder, then renames the result to `path`.

    Raises:
        OSError: It cannot be written; `filename` is `path`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        # Python names no file where a write itself fails, as on a full disk.
        reason = error.strerror or str(error)
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8; what no text holds, such as bytes of a file's name, is written as an escape."""
    content = text.encode("utf-8", "backslashreplace")
    write_file(path, lambda temporary: temporary.write_bytes(content))


def check_writable(folder: Path) -> None:
    """Tries whether a file can be written into a folder, and leaves everything as it was.

    Raises:
        OSError, ValueError: It cannot.
    """
    made: list[Path] = []
    try:
        for place in (*reversed(folder.parents), folder):
            if not place.exists():
                place.mkdir()
                made.append(place)
        trial = folder / f".{os.getpid()}.tmp"
        try:
            trial.write_bytes(b"x")
        finally:
            trial.unlink(missing_ok=True)
    finally:
        for place in reversed(made):
            place.rmdir()


def keep_trying(write: Callable[[], object], where: Path) -> None:
    """Repeats a write that the storage refuses, for up to two minutes.

    `write` must leave nothing behind where it fails. The messages name `where`.

    Raises:
        ArtifactError: The storage still refuses.
    """
    deadline = time.monotonic() + PATIENCE_SECONDS
    has_warned = False
    while True:
        try:
            write()
            return
        except OSError as error:
            reason = error.strerror or str(error)
            if time.monotonic() > deadline:
                raise ArtifactError(
                    f"{where} cannot be written ({reason}): free or mend the storage, then go on "
                    "with --resume"
                ) from error
            if not has_warned:
                logger.warning("%s cannot be written (%s): tried again and again", where, reason)
                has_warned = True
            time.sleep(RETRY_SECONDS)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON; NaN is an error."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    write_text(path, text)


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Writes detached copies of tensors as a safetensors file."""
    from safetensors.torch import save  # save_file would let only the owner read the file

    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_file(path, lambda temporary: temporary.write_bytes(save(plain)))


def read_tensors(path: Path) -> dict[str, "Tensor"]:
    """Reads a safetensors file.

    Raises:
        ArtifactError: The file is missing or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, load_file  # pyright: ignore[reportUnknownVariableType]

    try:
        return load_file(path) if _is_text(path) else load(path.read_bytes())
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file ({error})") from error


def _is_text(path: Path) -> bool:
    """Whether a path can be told to a library that is not written in Python."""
    try:
        str(path).encode()
    except UnicodeEncodeError:  # bytes that are no UTF-8
        return False
    return True


def write_yaml(path: Path, value: Any) -> None:
    """Writes YAML in the order of the keys."""
    write_text(path, to_yaml(value))


def to_yaml(value: Any) -> str:
    """YAML in the order of the keys."""
    return yaml.safe_dump(value, sort_keys=False)


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        ArtifactError: The file is missing, cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"{path}: {error.strerror}; is this the right folder?") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path}: not text in UTF-8; restore it from a copy") from error


def parse_json(text: str | bytes) -> Any:
    """Parses JSON that anybody may have written.

    Raises:
        ValueError: It is not JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError as error:
        if "set_int_max_str_digits" in str(error):
            raise ValueError("a number of thousands of digits") from None
        raise


def read_json(path: Path) -> Any:
    """Reads JSON.

    Raises:
        ArtifactError: The file is missing or is not JSON.
    """
    try:
        return parse_json(read_text(path))
    except ValueError as error:
        raise ArtifactError(
            f"{path}: not valid JSON ({error}); restore it from a copy, or start in a new folder"
        ) from error


def parse_yaml(text: str | bytes) -> Any:
    """Parses YAML that anybody may have written, as plain values.

    Raises:
        ValueError: It is not YAML, or is nested too deeply.
    """
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("nested too deeply") from None


def changed_keys(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Key paths whose values differ between two resolved configurations."""
    keys: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            keys += changed_keys(before, after, f"{prefix}{key}.")
        elif before != after:
            keys.append(prefix + key)
    return keys
