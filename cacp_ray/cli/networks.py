"""Commands for networks: inspect, train, finetune, export."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.cli.app import app, state
from cacp_ray.cli.options import (
    Address,
    AsJson,
    InputShape,
    Overrides,
    Resume,
    RunDir,
    Storage,
    parse_shape,
    print_json,
)
from cacp_ray.cli.results import print_report
from cacp_ray.errors import ConfigError


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="resnet20, torchvision:NAME, timm:NAME, package.module:factory, or a subnet folder"
        ),
    ],
    side: Annotated[int | None, typer.Option(min=1, help="Input height and width.")] = None,
    input_shape: InputShape = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Default: 1000 for torchvision and timm, else 10.")
    ] = None,
    members: Annotated[
        bool, typer.Option("--members", help="List every group with all its layers.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Print channel groups, layers that stay whole and why, and the reachable rates."""
    from cacp_ray.config.saved import import_code_of
    from cacp_ray.reporting.tables import groups_table, make_console
    from cacp_ray.workflows.analyze import inspect_model

    shape = parse_shape(input_shape)
    import_code_of(Path(model))
    inspected = inspect_model(model, side=side, input_shape=shape, num_classes=num_classes)
    plan, budget = inspected.analysis.plan, inspected.analysis.budget
    if as_json:
        whole = plan.cost_model.num_channels
        groups = [
            {
                "name": group.name, "num_channels": group.num_channels,
                "least": int(least), "is_residual": group.is_residual,
                "members": list(group.members),
            }
            for group, least in zip(plan.groups, budget.min_counts, strict=True)
        ]  # fmt: skip
        print_json(
            {
                "name": inspected.name, "input_shape": list(plan.input_shape),
                "macs": int(plan.macs(whole)), "params": int(plan.params(whole)),
                "smallest_rate": budget.smallest / budget.total, "groups": groups,
                "whole_layers": dict(plan.fixed),
            }
        )  # fmt: skip
        return
    make_console().print(
        groups_table(
            inspected.name,
            inspected.about,
            plan.cost_model,
            budget.min_counts,
            plan.fixed,
            uncounted=plan.describe_uncounted(),
            base_channels=inspected.base_channels,
            with_members=members,
        )
    )


@app.command()
def train(
    config: Annotated[Path, typer.Argument(help="YAML file, such as tune_configs/train_*.yaml")],
    run_dir: RunDir = None,
    overrides: Overrides = None,
    resume: Resume = False,
) -> None:
    """Train a base network."""
    from cacp_ray import api
    from cacp_ray.config.reading import load_config
    from cacp_ray.config.run import TrainConfig

    settings = load_config(TrainConfig, config, overrides or [])
    folder = run_dir or Path("runs") / settings.name
    result = api.train_model(
        settings,
        folder,
        resume=resume,
        on_epoch=lambda epoch, seconds: (
            None
            if state["quiet"]
            else typer.echo(
                f"epoch {epoch.epoch + 1}/{settings.training.epochs}  loss {epoch.train_loss:.3f}  "
                f"search split {100 * epoch.search.top1:.2f} %  {seconds:.0f} s"
            )
        ),
    )
    typer.echo(
        f"search split {100 * result['search']['top1']:.2f} %, "
        f"test split {100 * result['test']['top1']:.2f} %: {folder / 'model.safetensors'}"
    )


@app.command()
def finetune(
    folder: Annotated[Path, typer.Argument(help="Run directory or subnet folder.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file, such as tune_configs/finetune_variants.yaml"),
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    storage: Storage = None,
) -> None:
    """Fine-tune all subnets of a search on Ray Tune, side by side or down the ladder, or one."""
    from cacp_ray.workflows.storage import open_for_training

    if storage is not None and (folder / "subnet.json").exists():
        raise ConfigError(f"{folder} is one subnet: with --storage, give its run")
    mirror = None if storage is None else open_for_training(storage, folder)
    options = {"overrides": overrides or [], "address": address, "resume": resume}
    result = run_finetune(folder, config=config, storage=mirror, **options)
    if "rates" in result:
        print_report(folder)
        if mirror is not None:
            mirror.finish(folder)  # the report too
        return
    print_trained(folder, result)


@app.command()
def export(
    subnet: Annotated[
        Path,
        typer.Argument(
            metavar="SUBNET", help="Subnet folder, such as runs/NAME/subnets/rate-0.50."
        ),
    ],
    format: Annotated[str, typer.Option(help="onnx, openvino, torch-export or state-dict.")],
    int8: Annotated[
        bool, typer.Option("--int8", help="Compute with 8-bit integers: onnx and openvino.")
    ] = False,
    max_drop: Annotated[
        float, typer.Option(metavar="POINTS", help="What INT8 may lose on the search split.")
    ] = 1.0,
    out: Annotated[
        Path | None,
        typer.Option(help="File to write; default: subnet.onnx (or similar) in the folder."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="finetuned, search, or latest (fine-tuned if available).")
    ] = "latest",
) -> None:
    """Write a subnet as one checked file for other programs, for any batch size."""
    from cacp_ray.config.saved import import_code_of
    from cacp_ray.workflows.export import export as export_file

    chosen = {"latest": None, "finetuned": True, "search": False}
    if weights not in chosen:
        raise ConfigError(f"--weights {weights}: choose finetuned, search or latest")
    import_code_of(subnet)
    done = export_file(
        subnet, format, out=out, finetuned=chosen[weights], int8=int8, max_drop=max_drop
    )
    opset = f"opset {done.opset}, " if done.opset is not None else ""
    sizes = " and ".join(map(str, done.batch_sizes))
    checked = (
        f"largest difference {done.max_error:.1e} of the largest output"
        if done.scores is None
        else "search split: {} in float32, {} in INT8".format(*done.scores)
    )
    typer.echo(
        f"{done.path}: {'fine-tuned weights' if done.finetuned else 'weights after the search'}, "
        f"{done.size / 1e6:.2f} MB, {opset}{checked}, "
        f"{f'at batch sizes {sizes}' if sizes else 'for inputs of fixed shapes only'}"
    )


@app.command()
def push(
    place: Annotated[
        Path, typer.Argument(metavar="RUN|SUBNET", help="Run directory or subnet folder.")
    ],
    repo: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Model on the Hub.")],
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.")
    ] = False,
) -> None:
    """Upload subnets with a model card to the Hugging Face Hub."""
    from cacp_ray.workflows.push import push as upload

    address = upload(place, repo, private=private)
    folder = "" if (place / "subnet.json").exists() else "/rate-R"
    typer.echo(f'{address}: load it by cacp_ray.load_subnet("hf://{repo}{folder}")')


def print_trained(folder: Path, result: dict[str, Any]) -> None:
    """Prints what the fine-tuning of one subnet reached."""
    typer.echo(
        f"search split {100 * result['search_score']:.2f} % (before "
        f"{100 * result['search_score_before']:.2f} %), test split "
        f"{100 * result['test_score']:.2f} %: {folder / 'finetuned.safetensors'}"
    )


def run_finetune(folder: Path, **options: Any) -> dict[str, Any]:
    """Fine-tunes while a display shows the epochs."""
    from cacp_ray import api
    from cacp_ray.reporting.displays import FinetuneDisplay

    with FinetuneDisplay(quiet=state["quiet"]) as display:
        return api.finetune(folder, on_epoch=display.update, **options)
