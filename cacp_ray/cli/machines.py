"""Commands for the machines of a cluster: watch-spot."""

from functools import partial
from typing import Annotated, Literal

import typer

from cacp_ray.cli.app import app


@app.command()
def watch_spot(
    cloud: Annotated[
        Literal["aws", "gcp", "azure"] | None,
        typer.Option(help="Default: the one whose metadata service answers here."),
    ] = None,
    address: Annotated[str, typer.Option(help="Ray cluster of this machine.")] = "auto",
    metadata: Annotated[
        str | None, typer.Option(help="URL of the metadata service; default: the cloud's.")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="Id of the Ray node; default: this machine's.")
    ] = None,
) -> None:
    """Drain this machine's Ray node once its cloud announces that it is taken away.

    For spot machines that Ray's cluster launcher starts; clusters/*.yaml run it.
    """
    from cacp_ray.distributed import spot

    chosen = cloud or spot.find_cloud()
    drain = partial(spot.drain_this_node, address, node=node)
    spot.watch(chosen, metadata or spot.METADATA[chosen], drain)
    typer.echo("this machine's node is drained")
