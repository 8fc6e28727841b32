"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: a.b=1.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what the folder holds.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Default: runs/NAME.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster; default RAY_ADDRESS, else local.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
