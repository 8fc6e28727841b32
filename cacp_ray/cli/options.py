"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

from cacp_ray.errors import ConfigError

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
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]


def parse_numbers(option: str, text: str) -> list[int]:
    """Reads whole numbers of 1 or more with commas between them.

    Raises:
        ConfigError: The text has another form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part[:9]) >= 1 for part in parts):
        raise ConfigError(f"{option} {text}: write whole numbers of 1 or more, such as 1,64")
    return [int(part) for part in parts]


def parse_rates(text: str) -> list[float]:
    """Reads `0.42`, or `LO:HI:STEP` with both ends.

    Raises:
        ConfigError: The text has another form, or a rate is outside (0, 1].
    """
    try:
        numbers = [float(part) for part in text.split(":")]
        if len(numbers) == 3:
            low, high, step = numbers
            count = int((high - low) / step + 1e-9) + 1
            numbers = [round(low + step * i, 4) for i in range(count)]
        elif len(numbers) != 1:
            raise ValueError(text)
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ConfigError(f"--rate {text}: write one rate such as 0.42, or 0.2:0.9:0.02") from error
    if not numbers:
        raise ConfigError(f"--rate {text}: write the smaller rate first")
    if not all(0 < number <= 1 and number == round(number, 2) for number in numbers):
        raise ConfigError(
            f"--rate {text}: a rate is the share of the cost kept, in (0, 1], with two decimals"
        )
    return numbers
