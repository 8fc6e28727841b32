"""Commands that read a run: report, subnet, evaluate."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.cli.app import app
from cacp_ray.cli.options import RunFolder
from cacp_ray.errors import ConfigError


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html and print the final table."""
    print_report(run)


@app.command()
def subnet(
    run: RunFolder,
    rate: Annotated[
        str, typer.Option(help="Share of the cost KEPT: 0.42; of LO:HI:STEP nothing is saved.")
    ],
    evaluations: Annotated[
        int, typer.Option(min=0, help="0: the policy's answer; N: the best of N around it.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the subnet. Default: subnets/rate-R in the run.")
    ] = None,
) -> None:
    """Answer any rate from the trained policy, without searching again."""
    from cacp_ray.folders import read_run_config
    from cacp_ray.reporting.tables import answers_table, make_console
    from cacp_ray.results import answer_rates, parse_rates, read_result

    rates = parse_rates(rate)
    config, result = read_run_config(run), read_result(run)
    if out is not None and len(rates) > 1:
        raise ConfigError("--out is the folder of one subnet: give one rate")
    answers = answer_rates(config, run, rates, evaluations, save=len(rates) == 1, out=out)
    make_console().print(answers_table(result, answers))
    if "path" in answers[0]:
        typer.echo(f"saved: {run / answers[0]['path']}")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|SUBNET", help="A run or a subnet folder.")],
    index: Annotated[int | None, typer.Option(help="Re-score this candidate of a run.")] = None,
    split: Annotated[str, typer.Option(help="search or test.")] = "search",
) -> None:
    """Load and measure subnets, or rebuild and re-score a recorded candidate."""
    from cacp_ray.folders import read_run_config
    from cacp_ray.results import evaluate_subnet, read_result, rescore_candidate

    if split not in ("search", "test"):
        raise ConfigError(f"--split {split}: choose search or test")
    if index is not None:
        if split != "search":
            raise ConfigError("--index re-scores on the search split: leave --split out")
        record, found = rescore_candidate(read_run_config(path), path, index)
        typer.echo(f"candidate {index}, rate {record.rate:.2f}, search split: {_percent(found)}")
        typer.echo(f"recorded: {100 * record.top1:.2f} %")
        return
    is_subnet = (path / "subnet.json").exists()
    if is_subnet and not (path.absolute().parent.parent / "config.yaml").exists():
        raise ConfigError(f"{path} stands outside its run, whose config.yaml names the data")
    run = path.absolute().parent.parent if is_subnet else path
    config = read_run_config(run)
    folders = [path] if is_subnet else [run / row["path"] for row in read_result(run)["rates"]]
    for folder in folders:
        description, found = evaluate_subnet(folder, config, split)
        typer.echo(f"{folder}: rate {description['rate']:.2f}, {split} split {_percent(found)}")


def _percent(accuracy: Any) -> str:
    error = 100 * accuracy.standard_error
    return f"{100 * accuracy.top1:.2f} % (standard error {error:.2f}, {accuracy.images} images)"


def print_report(folder: Path) -> None:
    """Writes report.html and prints the final table."""
    from cacp_ray.folders import read_run_config
    from cacp_ray.reporting.tables import final_table, frontier_table, make_console
    from cacp_ray.results import read_result, report_run

    read_run_config(folder)
    result = read_result(folder)
    console = make_console()
    console.print(final_table(result))
    if result["frontier"]:
        console.print()
        console.print(frontier_table(result))
    typer.echo(f"report: {report_run(folder)}")
