"""Commands that read a run: report, subnet, evaluate."""

from pathlib import Path
from typing import Annotated

import typer

from cacp_ray.cli.app import app
from cacp_ray.cli.options import AsJson, RunFolder, print_json
from cacp_ray.errors import ConfigError
from cacp_ray.io.rates import format_rate


@app.command()
def report(run: RunFolder, as_json: AsJson = False) -> None:
    """Write report.html and print the final table, or result.json as JSON."""
    if not as_json:
        print_report(run)
        return
    from cacp_ray.reporting.run_report import report_run
    from cacp_ray.rundir.directory import read_result
    from cacp_ray.rundir.schema import ReportedFile

    print_json(read_result(run, ReportedFile) | {"report": str(report_run(run))})


@app.command()
def benchmark(
    places: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|SUBNET...", help="A run directory, or subnets of one run."),
    ],
    formats: Annotated[
        str | None,
        typer.Option(
            "--format",
            metavar="NAME,...",
            help="Of torch, onnx, onnx-int8, openvino, openvino-int8; default: what is installed.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="N,...", help="Batch sizes.")] = "1,64",
    threads: Annotated[int, typer.Option(min=1, help="Threads of every runtime.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="JSON file to write; default: benchmark.json in the run.")
    ] = None,
) -> None:
    """Prune, quantise, or both: score, size and latency in the formats that deploy a network."""
    from cacp_ray.cli.options import parse_numbers
    from cacp_ray.config.saved import import_code_of
    from cacp_ray.io.files import write_json
    from cacp_ray.reporting.tables import benchmark_table, make_console
    from cacp_ray.rundir.schema import BENCHMARK_FILE
    from cacp_ray.workflows.benchmark import benchmark as measure

    for place in places:
        import_code_of(place)
    is_run = len(places) == 1 and not (places[0] / "subnet.json").exists()
    if out is not None and out.is_dir():  # before minutes of measuring
        raise ConfigError(f"--out {out} is a folder: name a file in it, such as benchmark.json")
    content = measure(
        places,
        formats=None if formats is None else formats.split(","),
        batches=parse_numbers("--batch", batch),
        threads=threads,
    )
    make_console().print(benchmark_table(content))
    if out is None and is_run:
        out = places[0] / BENCHMARK_FILE
    if out is not None:
        write_json(out, content)
        note = "; cacp-ray report shows it" if is_run else ""
        typer.echo(f"saved: {out}{note}")


@app.command()
def evaluate(
    path: Annotated[
        Path, typer.Argument(metavar="RUN|SUBNET", help="Run directory or subnet folder.")
    ],
    index: Annotated[
        int | None, typer.Option(help="Score this recorded candidate of a run again.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split to measure on: search or test.")] = "search",
    as_json: AsJson = False,
) -> None:
    """Measure subnets, or rebuild and score a recorded candidate again."""
    from cacp_ray.reporting.tables import make_console, measured_table
    from cacp_ray.workflows.answers import evaluate_subnets, rescore_candidate

    if split not in ("search", "test"):
        raise ConfigError(f"--split {split}: choose search or test")
    if index is not None:
        if split != "search":
            raise ConfigError("--index re-scores on the search split: leave --split out")
        record, again, metric = rescore_candidate(path, index)
        if as_json:
            known = {"index": index, "rate": record.rate, "recorded": record.score}
            print_json(known | again.describe())
            return
        images = f" ({again.images} images)" if again.images else ""
        typer.echo(
            f"candidate {index}, rate {format_rate(record.rate)}: "
            f"{metric.describe(again.score)}{images}"
        )
        typer.echo(f"recorded: {metric.describe(record.score)}")
        return
    measured = list(evaluate_subnets(path, split))
    if as_json:
        print_json(
            [
                {"path": str(folder), "rate": rate, "split": split, **scored.describe()}
                for folder, rate, scored, _ in measured
            ]
        )
        return
    make_console().print(measured_table(split, measured))


def print_report(folder: Path) -> None:
    """Writes report.html and prints the final table."""
    from cacp_ray.config.saved import read_run_config
    from cacp_ray.reporting.run_report import report_run
    from cacp_ray.reporting.tables import final_table, frontier_table, make_console
    from cacp_ray.rundir.directory import read_result
    from cacp_ray.rundir.schema import ReportedFile

    read_run_config(folder)
    result = read_result(folder, ReportedFile)
    console = make_console()
    console.print(final_table(result))
    if result["frontier"]:
        console.print()
        console.print(frontier_table(result))
    typer.echo(f"report: {report_run(folder)}")
