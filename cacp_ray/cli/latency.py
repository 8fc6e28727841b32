"""Commands for latency: latency measure."""

from pathlib import Path
from typing import Annotated

import typer

from cacp_ray.cli.app import app, state
from cacp_ray.cli.options import InputShape, parse_shape
from cacp_ray.errors import ConfigError, EvaluationError

latency_app = typer.Typer(
    no_args_is_help=True, help="Measure the latency of layers on this machine."
)
app.add_typer(latency_app, name="latency")


@latency_app.callback()
def setup() -> None:
    """Measure the latency of layers on this machine."""  # the callback makes a group of one


@latency_app.command("measure")
def measure_layers(
    model: Annotated[
        str, typer.Argument(help="resnet20, torchvision:NAME, timm:NAME or package.module:factory")
    ],
    out: Annotated[
        Path, typer.Option(help="Parquet file of the table; an existing one is replaced.")
    ],
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Images in a forward pass.")] = 1,
    side: Annotated[int | None, typer.Option(min=1, help="Input height and width.")] = None,
    input_shape: InputShape = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Default: 1000 for torchvision and timm, else 10.")
    ] = None,
    points: Annotated[
        int, typer.Option(min=2, help="Most widths to time on each side of a layer.")
    ] = 17,
    round_to: Annotated[
        int,
        typer.Option(
            min=1, help="Widths are multiples of this; use the search's pruning.round_to."
        ),
    ] = 8,
    seconds: Annotated[float, typer.Option(min=0, help="Approximate time limit.")] = 120.0,
    runtime: Annotated[
        str, typer.Option(help="What deploys the networks: torch, onnxruntime or openvino.")
    ] = "torch",
    command: Annotated[
        str | None,
        typer.Option(
            help="Instead, a program that takes an ONNX file as its last argument and prints "
            "milliseconds, for example one that runs it on a phone."
        ),
    ] = None,
) -> None:
    """Time the layers of a network at many widths, for searches with cost: latency."""
    from rich.progress import Progress

    from cacp_ray.evaluation.latency_table import COMMAND, Settings, save_table
    from cacp_ray.evaluation.layer_timing import measure_table
    from cacp_ray.exporting.timing import make_timer
    from cacp_ray.reporting.tables import make_console
    from cacp_ray.workflows.analyze import inspect_model

    if out.is_dir():
        raise ConfigError(f"--out {out} is a folder: name a file in it, such as table.parquet")
    if command is not None and runtime != "torch":
        raise ConfigError("--command times by itself: leave out --runtime")
    runtime = runtime if command is None else COMMAND
    settings = Settings(device, threads, batch, runtime, command)
    settings.check()
    shape = parse_shape(input_shape)
    timer = make_timer(settings)
    inspected = inspect_model(model, side=side, input_shape=shape, num_classes=num_classes)
    try:
        with Progress(console=make_console(), disable=state["quiet"]) as progress:
            task = progress.add_task("layers", total=None)
            table = measure_table(
                inspected.name,
                inspected.analysis.model,
                inspected.analysis.plan,
                settings,
                points=points,
                round_to=round_to,
                seconds=seconds,
                timer=timer,
                on_progress=lambda what, done, total: progress.update(
                    task, description=what, completed=done, total=total
                ),
            )
    except KeyboardInterrupt as error:
        raise EvaluationError(f"interrupted: {out} was not written") from error
    save_table(table, out)
    typer.echo(
        f"{out}: {len(table.grids)} layer shapes at {len(table.cells):,} widths; median error "
        f"{100 * table.error:.1f} % of the {table.networks} networks it was calibrated on"
    )
