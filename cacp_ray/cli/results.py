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
) -> None:
    """Make a subnet for any rate without a new search.

    After a fine-tuning, it is cut from the nearest larger trained subnet. Before, the policy
    answers.
    """
    from cacp_ray.cli.options import parse_rates
    from cacp_ray.config.saved import read_run_config
    from cacp_ray.evaluation.latency_table import Settings
    from cacp_ray.reporting.summary import binomial_error
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
    config = read_run_config(run)
    result = read_result(run, ReportedFile)
    if out is not None and len(rates) > 1:
        raise ConfigError("--out is the folder of one subnet: give one rate")
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
    first = answers[0]
    if "latency_ms" in first:
        typer.echo(f"latency: {first['latency_ms']:.3g} ms")
    images = (result["base"].get("search") or {}).get("images")
    if rate is None and result["metric"]["is_share"] and images:
        error = 100 * binomial_error(first["score"], images)
        typer.echo(f"standard error of its accuracy: {error:.2f} points ({images:,} images)")
    if "path" in answers[0]:
        folder = run / answers[0]["path"]
        typer.echo(f"saved: {folder}")
        # A subnet of a task of the user's own is trained with its run, or by their own code.
        if config.task is None and not (folder / "finetuned.safetensors").exists():
            typer.echo(f"train it on: cacp-ray finetune {folder}")


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
