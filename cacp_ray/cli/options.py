"""Options that several commands share."""

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.errors import ConfigError
from cacp_ray.io.rates import parse_rate

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set one value of the configuration, such as a.b=1; repeatable.",
    ),
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what the folder holds.")]
RunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Folder of the run; default: runs/NAME.")
]
Address = Annotated[
    str | None,
    typer.Option("--address", help="Ray cluster; default: RAY_ADDRESS, else a local Ray."),
]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        help="Folder, s3://, gs:// or abfs:// URI that gets a copy of the run while it goes on; "
        "--resume can continue from it on another machine.",
    ),
]
InputShape = Annotated[
    str | None,
    typer.Option(
        "--input-shape",
        metavar="C,H,W",
        help="Shape of one input without the batch, such as 3,480,640; instead of --side.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for other programs.")]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


def print_json(content: Any) -> None:
    """Prints a value as JSON; NaN, which JSON lacks, becomes null."""
    typer.echo(json.dumps(_without_nan(content), indent=2, ensure_ascii=False))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def parse_numbers(option: str, text: str, example: str = "1,64") -> list[int]:
    """Reads whole numbers of 1 or more with commas between them.

    Raises:
        ConfigError: The text has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part[:9]) >= 1 for part in parts):
        raise ConfigError(f"{option} {text}: write whole numbers of 1 or more, such as {example}")
    return [int(part) for part in parts]


def parse_shape(text: str | None) -> list[int] | None:
    """Reads `--input-shape`; None where it was not given.

    Raises:
        ConfigError: It is no list of whole numbers of 1 or more.
    """
    return None if text is None else parse_numbers("--input-shape", text, "3,480,640")


def parse_rates(text: str) -> list[float]:
    """Reads `0.42`, `42%`, or `LO:HI:STEP` with both ends.

    Raises:
        ConfigError: The text has another form, or a rate is outside (0, 1].
    """
    try:
        numbers = [parse_rate(part) for part in text.split(":")]
        if len(numbers) == 3:
            low, high, step = numbers
            count = int((high - low) / step + 1e-9) + 1
            numbers = [round(low + step * i, 6) for i in range(count)]
        elif len(numbers) != 1:
            raise ValueError(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"--rate {text}: write one rate such as 0.42, or 0.2:0.9:0.02") from error
    if not numbers:
        raise ConfigError(f"--rate {text}: write the smaller rate first")
    if not all(0 < number <= 1 for number in numbers):
        raise ConfigError(f"--rate {text}: a rate is the share of the cost kept, in (0, 1]")
    return numbers
