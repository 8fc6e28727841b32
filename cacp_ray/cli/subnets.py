"""The command that makes a subnet of any rate from a run."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.cli.app import app
from cacp_ray.cli.networks import print_trained, run_finetune
from cacp_ray.cli.options import RunFolder
from cacp_ray.errors import ConfigError


@app.command()
def subnet(
    run: RunFolder,
    rate: Annotated[
        str | None,
        typer.Option(
            help="Share of the cost KEPT, such as 0.42; LO:HI:STEP prints many and saves none."
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="Instead of --rate, after a fine-tuning: the smallest network that loses at most "
            "so many points (or units of your score) against the whole one on the search split."
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            metavar="MS",
            help="Instead, after a fine-tuning: the largest network of at most so many "
            "milliseconds, by the run's latency table or measured here (batch 1, one thread).",
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option(help="What --latency measures: torch, onnxruntime or openvino.")
    ] = "torch",
    evaluations: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Ask the policy, even after a fine-tuning. 0: its own answer; N: the best of N "
            "candidates around it.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the subnet; default: subnets/rate-R in the run.")
    ] = None,
    finetune: Annotated[
        int | None,
        typer.Option(
            metavar="EPOCHS",
            min=1,
            help="Then train the subnet for so many epochs, by the recipe of its run.",
        ),
    ] = None,
) -> None:
    """Make a subnet for any rate without a new search.

    After a fine-tuning, it is cut from the nearest larger trained subnet. Before, the policy
    answers.
    """
    from cacp_ray.cli.options import parse_rates
    from cacp_ray.config.saved import read_run_config
    from cacp_ray.evaluation.latency_table import Settings
    from cacp_ray.reporting.tables import answers_table, make_console
    from cacp_ray.rundir.directory import read_result
    from cacp_ray.rundir.schema import ReportedFile
    from cacp_ray.workflows.answers import answer_rates
    from cacp_ray.workflows.trained import answer_from_trained, trained_folders
    from cacp_ray.workflows.wishes import answer_latency, answer_max_drop

    if (rate, max_drop, latency).count(None) != 2:
        raise ConfigError(
            "say how small: give one of --rate, such as 0.42, --max-drop, such as 1.0, and "
            "--latency, such as 2.5"
        )
    rates = parse_rates(rate) if rate is not None else []
    is_own = read_run_config(run).task is not None
    result = read_result(run, ReportedFile)
    if len(rates) > 1 and (out is not None or finetune is not None):
        option = "--out" if finetune is None else "--finetune"
        raise ConfigError(f"{option} is for one subnet: give one rate")
    if finetune is not None and is_own:
        raise ConfigError(
            "--finetune is for images: a subnet of a task of your own is trained with its run, or "
            "by your own code"
        )
    if finetune is not None and out is not None and out.resolve().parent.parent != run.resolve():
        raise ConfigError(
            f"--out {out}: --finetune takes data and recipe from the run that the subnet lies in: "
            f"give a folder in {run / 'subnets'}, or leave --out out"
        )
    save = len(rates) == 1
    if rate is None and evaluations is not None:
        raise ConfigError(
            f"--{'latency' if max_drop is None else 'max-drop'} cuts trained subnets and asks no "
            "policy: leave out --evaluations"
        )
    if latency is not None:
        settings = Settings(runtime=runtime)
        settings.check()
        answers = [answer_latency(run, latency, settings, out=out)]
        title = "The largest that is fast enough"
    elif max_drop is not None:
        answers = [answer_max_drop(run, max_drop, out=out)]
        title = "The smallest that is good enough"
    elif evaluations is None and trained_folders(run):
        answers = answer_from_trained(run, rates, save=save, out=out)
        title = "Cut from trained subnets and repaired"
    else:
        answers = answer_rates(run, rates, evaluations or 0, save=save, out=out)
        title = "Subnets from the policy"
    make_console().print(answers_table(title, result, answers))
    _print_first(result, answers[0], of_wish=rate is None)
    if "path" in answers[0]:
        _end(run / answers[0]["path"], finetune, is_own=is_own)


def _print_first(result: dict[str, Any], first: dict[str, Any], *, of_wish: bool) -> None:
    """Latency and certainty of a network that was not asked for by its rate."""
    from cacp_ray.reporting.summary import binomial_error

    if "latency_ms" in first:
        typer.echo(f"latency: {first['latency_ms']:.3g} ms")
    images = (result["base"].get("search") or {}).get("images")
    if of_wish and result["metric"]["is_share"] and images:
        error = 100 * binomial_error(first["score"], images)
        typer.echo(f"standard error of its accuracy: {error:.2f} points ({images:,} images)")


def _end(folder: Path, epochs: int | None, *, is_own: bool) -> None:
    """Trains what was saved, or says how."""
    typer.echo(f"saved: {folder}")
    if (folder / "finetuned.safetensors").exists():
        if epochs is not None:
            typer.echo("it is trained already, so --finetune does nothing")
        return
    if epochs is not None:
        # Alone it has no larger subnet.
        overrides = [f"finetune.epochs={epochs}", "finetune.teacher=base"]
        print_trained(folder, run_finetune(folder, overrides=overrides))
    elif not is_own:  # a subnet of a task of the user's own is trained with its run, or elsewhere
        typer.echo(f"train it on: cacp-ray finetune {folder}")
