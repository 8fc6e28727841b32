"""Commands for image data: data convert, data inspect."""

from typing import Annotated

import typer

from cacp_ray.cli.app import app, state
from cacp_ray.cli.options import Address, AsJson, print_json
from cacp_ray.errors import ArtifactError

data_app = typer.Typer(no_args_is_help=True, help="Convert and inspect image data.")
app.add_typer(data_app, name="data")


@data_app.command("inspect")
def inspect_data(
    path: Annotated[
        str,
        typer.Argument(
            help="Parquet file, folder or pattern of shards, or folder of class folders."
        ),
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Decode all images instead of 1,000 evenly spaced ones.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print rows, classes, class balance, image sizes, and the first broken image."""
    from cacp_ray.data.inspecting import describe, summarize
    from cacp_ray.data.sources import open_source

    summary = summarize(open_source(path), None if every else 1000)
    if as_json:
        sizes = [[*size, number] for size, number in summary.sizes.most_common()]
        per_class = dict(zip(summary.classes, summary.per_class.tolist(), strict=True))
        print_json(
            {
                "rows": summary.rows, "classes": per_class, "decoded": summary.decoded,
                "sizes": sizes, "modes": dict(summary.modes), "bytes": summary.num_bytes,
                "broken": summary.broken or None,
            }
        )  # fmt: skip
    else:
        typer.echo("\n".join(describe(path, summary)))
    if summary.broken:
        raise ArtifactError(f"data {summary.broken}: remove or replace that image")


@data_app.command("convert")
def convert_data(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SRC", help="Folder with a folder of images for each class, on every node."
        ),
    ],
    out: Annotated[
        str, typer.Argument(metavar="DST", help="Folder, s3://... or gs://... for the shards.")
    ],
    shards: Annotated[int, typer.Option(min=1, help="Number of files to write.")],
    prefix: Annotated[str, typer.Option(help="First part of the file names.")] = "train",
    address: Address = None,
) -> None:
    """Convert an image folder to Parquet shards on Ray; run again to continue after a stop."""
    from cacp_ray.distributed.cluster import check_address, connect
    from cacp_ray.distributed.converting import convert
    from cacp_ray.distributed.probe import probe_nodes
    from cacp_ray.reporting.displays import ConvertDisplay

    check_address(address)
    connect(address)
    probe_nodes()
    with ConvertDisplay(quiet=state["quiet"]) as display:
        rows = convert(source, out, shards, prefix, display.update)
    typer.echo(f"{rows:,} images in {shards:,} shards: {out}")
