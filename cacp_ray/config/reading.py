"""Reads configurations: a YAML file or its content, with single values changed."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from cacp_ray.config.run import Section, is_section
from cacp_ray.errors import ConfigError, nearest_names, one_line
from cacp_ray.io.code import add_code_folder
from cacp_ray.io.files import parse_yaml

AnyConfig = TypeVar("AnyConfig", bound=Section)


def load_config(
    kind: type[AnyConfig],
    source: str | Path | dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    defaults: dict[str, Any] | None = None,
    settings: dict[str, Any] | None = None,
    is_saved: bool = False,
) -> AnyConfig:
    """Reads and checks a configuration.

    Args:
        kind: Class of the configuration: `RunConfig`, `TrainConfig` and others.
        source: YAML file, or its content.
        overrides: `key.path=value`, the value in YAML.
        defaults: Sections that the source may leave out.
        settings: Sections that replace those of the source.
        is_saved: Whether a run holds the file. Code beside any other file may be named in it.

    Raises:
        ConfigError: The file cannot be read, or a key or value is not allowed.
    """
    if isinstance(source, dict):
        where = "configuration"
        values: Any = copy.deepcopy(source)
    else:
        where = f"configuration {source}"
        if not is_saved and Path(source).exists():
            add_code_folder(Path(source).parent)
        try:
            values = parse_yaml(Path(source).read_text(encoding="utf-8")) or {}
        except OSError as error:
            raise ConfigError(f"{where}: {error.strerror}; give a YAML file") from error
        except ValueError as error:
            raise ConfigError(f"{where}: not valid YAML ({one_line(error)})") from error
        if not is_section(values):
            raise ConfigError(f"{where}: expected `key: value` lines")
    values = copy.deepcopy(defaults or {}) | values | copy.deepcopy(settings or {})
    for text in overrides:
        _override(values, text)
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{where}: {_first_problem(kind, error)}") from error


def _override(values: dict[str, Any], text: str) -> None:
    path, separator, value = text.partition("=")
    if not separator or not path:
        raise ConfigError(f"--set {text}: write key.path=value")
    *parents, last = path.split(".")
    for key in parents:
        child = values.setdefault(key, {})
        if not is_section(child):
            raise ConfigError(f"--set {text}: {key} is not a section")
        values = child
    try:
        values[last] = parse_yaml(value)
    except ValueError as error:
        raise ConfigError(f"--set {text}: the value is not valid YAML") from error


def _first_problem(kind: type[Section], error: ValidationError) -> str:
    problem = error.errors()[0]
    path = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        known = _keys_at(kind, problem["loc"][:-1])
        return f"unknown key {path}; {nearest_names(str(problem['loc'][-1]), known)}"
    message = problem["msg"].removeprefix("Value error, ")
    if not path:
        return message
    # A whole section would show values that nobody wrote.
    is_shown = problem["type"] != "missing" and not is_section(problem["input"])
    given = f" (got {problem['input']!r})" if is_shown else ""
    return f"{path}: {message}{given}"


def _keys_at(kind: Any, path: Sequence[int | str]) -> list[str]:
    for part in path:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
        elif issubclass(kind, BaseModel):
            kind = kind.model_fields[str(part)].annotation
    if dataclasses.is_dataclass(kind):
        return [field.name for field in dataclasses.fields(kind)]
    return list(kind.model_fields)


def resolved(config: Section) -> dict[str, Any]:
    """The whole configuration as plain values, as it is saved with a run."""
    return config.model_dump(mode="json")
