"""The command line. Each command loads, calls the library once, and prints."""

import logging
import sys
from pathlib import Path
from typing import Annotated

import typer

from cacp_ray.errors import CacpError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Conditional automated channel pruning: one search, a smaller network for every rate.",
)

Overrides = Annotated[list[str] | None, typer.Option("--set", help="key.path=value, repeatable")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --run-dir.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Default: runs/NAME.")]


@app.callback()
def setup(
    debug: Annotated[bool, typer.Option("--debug", help="Log all and show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the final result.")] = False,
) -> None:
    """Settings of all commands."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    logging.getLogger("cacp_ray").setLevel(level)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as tune_configs/train_*.yaml")],
    run_dir: RunDir = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a base network."""
    from cacp_ray import api
    from cacp_ray.config import TrainConfig, load_config

    settings = load_config(TrainConfig, config, overrides or [])
    folder = run_dir or Path("runs") / settings.name
    result = api.train_model(
        settings,
        folder,
        resume=resume,
        on_epoch=lambda epoch, seconds: typer.echo(
            f"epoch {epoch.epoch + 1}/{settings.training.epochs}  loss {epoch.train_loss:.3f}  "
            f"search split {100 * epoch.search.top1:.2f} %  {seconds:.0f} s"
        ),
    )
    typer.echo(
        f"search split {100 * result['search']['top1']:.2f} %, "
        f"test split {100 * result['test']['top1']:.2f} %: {folder / 'model.safetensors'}"
    )


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, 1 for a failed run."""
    try:
        app()
    except CacpError as error:
        if "--debug" in sys.argv:
            raise
        typer.echo(f"cacp-ray: {error}", err=True)
        sys.exit(error.exit_code)
