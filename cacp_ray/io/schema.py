"""Files of JSON that are read through pydantic models, so that whatever is wrong is one line.

Values must have exactly the types of the model: no text for a number, no number of 1e12 where a
size is asked for. Other keys are left alone, for what a later version adds.
"""

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cacp_ray.errors import ArtifactError
from cacp_ray.io.files import read_json

SHOWN = 40  # characters of a wrong value in a message


class Content(BaseModel):
    """An object in a file."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


def _stay_inside(path: str) -> str:
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\0" in path:
        raise ValueError("no path inside the folder")
    return path


Name = Annotated[str, Field(min_length=1, max_length=300)]
InnerPath = Annotated[str, Field(max_length=300), AfterValidator(_stay_inside)]
Size = Annotated[int, Field(ge=1, le=10**6)]  # channels, pixels of a side
Classes = Annotated[int, Field(ge=1, le=10**5)]  # a layer of 2,000 inputs then takes 0.8 GB
Count = Annotated[int, Field(ge=0, le=10**15)]  # operations, parameters, images, bytes
Score = float  # of any scale
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Seconds = Annotated[float, Field(ge=0)]


def read_checked(path: Path, kind: type[Content], needed: Iterable[str] = ()) -> dict[str, Any]:
    """Reads a JSON object that must be as the model says, and returns it as it is.

    Args:
        path: The file.
        kind: The model.
        needed: Keys that must be there although the model does without them.

    Raises:
        ArtifactError: The file is missing, is not JSON, or holds something else.
    """
    return check_content(path, read_json(path), kind, needed)


def check_content(
    path: Path, content: Any, kind: type[Content], needed: Iterable[str] = ()
) -> dict[str, Any]:
    """The same for content that was read from the file already."""
    if problem := find_problem(content, kind, needed):
        raise ArtifactError(f"{path}: {problem}; restore it from a copy, or make it anew")
    return content


def find_problem(content: Any, kind: type[Content], needed: Iterable[str] = ()) -> str:
    """What is wrong with a value from a file; empty where nothing is."""
    if not _is_object(content):
        return "no JSON object"
    try:
        kind.model_validate(content)
        problems: list[Any] = []
    except ValidationError as error:
        problems = list(error.errors())
    lacking = {str(p["loc"][0]) for p in problems if p["type"] == "missing" and len(p["loc"]) == 1}
    if missing := sorted(lacking | {key for key in needed if content.get(key) is None}):
        return f"no {', '.join(missing)} in it"
    if not problems:
        return ""
    problem = problems[0]
    where = ".".join(str(part)[:SHOWN] for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if problem["type"] == "missing" else f" (got {_shorten(problem['input'])})"
    return f"{where}: {message}{given}" if where else message


def version_of(content: Any, default: int) -> Any:
    """What an object says of its version; the default for anything else."""
    return cast(dict[str, Any], content).get("schema_version") if _is_object(content) else default


def _is_object(content: Any) -> bool:
    return isinstance(content, dict)


def _shorten(value: Any) -> str:
    """The value as JSON text would show it, cut; it may be deeply nested or huge."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__} of {len(value)}"
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        return "a huge number"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
