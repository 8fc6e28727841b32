"""The command line. Each command loads, calls the library once, and prints."""

import logging
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from cacp_ray.errors import CacpError, ConfigError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Conditional automated channel pruning: one search, a smaller network for every rate. "
    "A rate is the share of the cost that is KEPT: 0.3 is smaller than 0.7.",
)

data_app = typer.Typer(no_args_is_help=True, help="Convert and inspect image data.")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value: a.b=1.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue what the folder holds.")]
RunDir = Annotated[Path | None, typer.Option("--run-dir", help="Default: runs/NAME.")]
Address = Annotated[
    str | None, typer.Option("--address", help="Ray cluster; default RAY_ADDRESS, else local.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
state = {"quiet": False}
INTERRUPTED = 130  # exit code
logger = logging.getLogger("cacp_ray.cli")  # also where the module is run as __main__


class _PrintHandler(logging.Handler):
    """Prints to whatever standard output is now, so that lines stay above a live table."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record))


@app.callback()
def setup(
    debug: Annotated[bool, typer.Option("--debug", help="Log all and show tracebacks.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Only the final result.")] = False,
) -> None:
    """Settings of all commands; they stand before the command."""
    level = logging.DEBUG if debug else logging.WARNING if quiet else logging.INFO
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[_PrintHandler()])
    logging.getLogger("cacp_ray").setLevel(level)
    for name in () if debug else ("ray", "ray.tune"):
        logging.getLogger(name).setLevel(logging.ERROR)
    state["quiet"] = quiet


@app.command()
def demo(run_dir: RunDir = None, resume: Resume = False) -> None:
    """Search, fine-tune and report on the embedded CIFAR-10 sample, in minutes on a laptop."""
    from cacp_ray.config import RunConfig

    names = (Path("runs") / f"demo{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    folder = run_dir or next(path for path in names if resume or not path.exists())
    _search(RunConfig(name="demo"), folder, resume=resume)
    typer.echo(
        f"fine-tuning on Ray Tune; go on after a stop: cacp-ray demo --run-dir {folder} --resume"
    )
    _finetune(folder, resume=resume)
    _report(folder)


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            help="resnet20, torchvision:NAME, timm:NAME, package.module:factory, or a subnet folder"
        ),
    ],
    side: Annotated[int | None, typer.Option(min=1, help="Input height and width.")] = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, help="Default: 1000 for torchvision and timm, else 10.")
    ] = None,
    members: Annotated[
        bool, typer.Option("--members", help="List every group with all its layers.")
    ] = False,
) -> None:
    """Print channel groups, what stays whole and why, and the reachable rates."""
    from cacp_ray.analysis import inspect_model
    from cacp_ray.reporting.tables import groups_table, make_console

    found = inspect_model(model, side=side, num_classes=num_classes)
    plan, budget = found.analysis.plan, found.analysis.budget
    make_console().print(
        groups_table(
            found.name,
            found.about,
            plan.cost_model,
            budget.min_counts,
            plan.fixed,
            base_channels=found.base_channels,
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
    from cacp_ray.config import TrainConfig, load_config

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
def search(
    config: Annotated[Path, typer.Argument(help="YAML file, such as tune_configs/quickstart.yaml")],
    run_dir: RunDir = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help="cacp, cacp-paper, amc, hill_climb, cem, random ...; several: a run directory "
            "each in --run-dir, and their comparison.",
        ),
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    cache: Annotated[
        Path | None,
        typer.Option("--cache", help="Folder that keeps measurements for other runs."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            "--storage",
            help="Folder, s3:// or gs:// URI that the run is copied to at every checkpoint; with "
            "--resume, it goes on from there.",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all input and print what would be searched.")
    ] = False,
) -> None:
    """Search a smaller network for every rate at once."""
    from cacp_ray.config import RunConfig, load_config

    if strategy and "," in strategy:
        if storage:
            raise ConfigError("--storage holds one run: search with one --strategy")
        settings, names = load_config(RunConfig, config, overrides or []), strategy.split(",")
        options = {"address": address, "cache": cache}
        _search_each(settings, names, run_dir, resume=resume, dry_run=dry_run, **options)
        return
    changes = [*(overrides or []), *([f"strategy={strategy}"] if strategy else [])]
    settings = load_config(RunConfig, config, changes)
    folder = run_dir or Path("runs") / settings.name
    if dry_run:
        from cacp_ray.api import check_search

        typer.echo(check_search(settings, folder, resume=resume))
        return
    _search(settings, folder, resume=resume, address=address, cache=cache, storage=storage)
    _report(folder)
    if storage:
        from cacp_ray.storage import RunStorage

        RunStorage(storage).finish(folder)  # the report too


@app.command()
def tune_agent(
    config: Annotated[Path, typer.Argument(help="YAML file, such as tune_configs/agent_asha.yaml")],
    run_dir: RunDir = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
) -> None:
    """Find the agent's settings that search best on a network, by Ray Tune."""
    from cacp_ray import api
    from cacp_ray.agent_space import AgentTuningConfig
    from cacp_ray.config import load_config
    from cacp_ray.reporting.tables import make_console
    from cacp_ray.reporting.tuning import tuning_table
    from cacp_ray.reporting.tuning_progress import TuningDisplay

    settings = load_config(AgentTuningConfig, config, overrides or [])
    folder = run_dir or Path("runs") / settings.name
    with TuningDisplay(settings.trials, quiet=state["quiet"]) as display:
        result = api.tune_agent(
            settings, folder, resume=resume, address=address, on_progress=display.update
        )
    make_console().print(tuning_table(result))
    typer.echo(f"best settings: cacp-ray search {folder / 'best.yaml'}")
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def finetune(
    folder: Annotated[Path, typer.Argument(help="A run directory, or a subnet folder.")],
    config: Annotated[
        Path | None,
        typer.Option("--config", help="YAML file, such as tune_configs/finetune_variants.yaml"),
    ] = None,
    address: Address = None,
    resume: Resume = False,
) -> None:
    """Fine-tune the subnets of a search, all rates side by side on Ray Tune, or one subnet."""
    from cacp_ray.config import load_config
    from cacp_ray.finetuning import FinetuneConfig

    settings = load_config(FinetuneConfig, config) if config else None
    result = _finetune(folder, config=settings, address=address, resume=resume)
    if "rates" in result:
        _report(folder)
        return
    typer.echo(
        f"search split {100 * result['search_top1']:.2f} % (before "
        f"{100 * result['search_top1_before']:.2f} %), test split "
        f"{100 * result['test_top1']:.2f} %: {folder / 'finetuned.safetensors'}"
    )


@app.command()
def subnet(
    run: RunFolder,
    rate: Annotated[str, typer.Option(help="Share of the cost KEPT: 0.42, or LO:HI:STEP.")],
    evaluations: Annotated[
        int, typer.Option(min=0, help="0: the policy's answer; N: the best of N around it.")
    ] = 0,
) -> None:
    """Answer a rate that was never searched from the trained policy."""
    from cacp_ray.api import read_run_config
    from cacp_ray.reporting.tables import frontier_table, make_console
    from cacp_ray.results import answer_rates, parse_rates, read_result

    rates = parse_rates(rate)
    config, result = read_run_config(run), read_result(run)
    answers = answer_rates(config, run, rates, evaluations, save=len(rates) == 1)
    make_console().print(frontier_table(result | {"frontier": answers}))
    if "path" in answers[0]:
        typer.echo(f"saved: {run / answers[0]['path']}")


@app.command()
def evaluate(
    path: Annotated[Path, typer.Argument(metavar="RUN|SUBNET", help="A run or a subnet folder.")],
    index: Annotated[int | None, typer.Option(help="Re-score this candidate of a run.")] = None,
    split: Annotated[str, typer.Option(help="search or test.")] = "search",
) -> None:
    """Load and measure subnets, or rebuild and re-score a recorded candidate."""
    from cacp_ray.api import read_run_config
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


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN", help="Run directories, or folders of them.")
    ],
    out: Annotated[
        Path, typer.Option(help="For comparison.png, .svg and .json; an earlier one is replaced.")
    ] = Path("comparison"),
) -> None:
    """Put runs on the same network and data side by side: accuracy, evaluations, time."""
    from cacp_ray.api import check_out

    check_out(out)
    _compare(runs, out)


@app.command()
def export(
    subnet: Annotated[
        Path, typer.Argument(metavar="SUBNET", help="Such as runs/NAME/subnets/rate-0.50.")
    ],
    format: Annotated[str, typer.Option(help="onnx, torch-export or state-dict.")],
    out: Annotated[
        Path | None, typer.Option(help="The file; default: subnet.onnx or so in the folder.")
    ] = None,
    weights: Annotated[
        str, typer.Option(help="finetuned, search, or latest: fine-tuned where there are some.")
    ] = "latest",
) -> None:
    """Write a subnet as one checked file for other programs; any batch size."""
    from cacp_ray.exporting.subnet import export_subnet

    chosen = {"latest": None, "finetuned": True, "search": False}
    if weights not in chosen:
        raise ConfigError(f"--weights {weights}: choose finetuned, search or latest")
    done = export_subnet(subnet, format, out=out, finetuned=chosen[weights])
    opset = f"opset {done.opset}, " if done.opset is not None else ""
    typer.echo(
        f"{done.path}: {'fine-tuned weights' if done.finetuned else 'weights after the search'}, "
        f"{done.size / 1e6:.2f} MB, {opset}largest difference {done.max_error:.1e} of the largest "
        f"output, at batch sizes {' and '.join(map(str, done.batch_sizes))}"
    )


@app.command()
def report(run: RunFolder) -> None:
    """Write report.html and print the final table."""
    _report(run)


@data_app.command("inspect")
def inspect_data(
    path: Annotated[
        str,
        typer.Argument(help="Parquet file, folder or pattern of shards, folder of class folders."),
    ],
    every: Annotated[
        bool, typer.Option("--all", help="Decode all images, not 1,000 evenly spaced ones.")
    ] = False,
) -> None:
    """Print rows, classes, class balance, image sizes, and the first image that is broken."""
    from cacp_ray.data.inspecting import describe, summarize
    from cacp_ray.data.sources import open_source

    found = summarize(open_source(path), None if every else 1000)
    typer.echo("\n".join(describe(path, found)))
    if found.broken:
        raise typer.Exit(2)


@data_app.command("convert")
def convert_data(
    kind: Annotated[str, typer.Argument(help="imagefolder: a folder of images for each class.")],
    source: Annotated[str, typer.Argument(metavar="SRC")],
    out: Annotated[str, typer.Argument(metavar="DST", help="Folder, s3://... or gs://...")],
    shards: Annotated[int, typer.Option(min=1, help="Files to write.")],
    prefix: Annotated[str, typer.Option(help="Of their names.")] = "train",
    address: Address = None,
) -> None:
    """Write Parquet shards of an image folder, in parallel on Ray; a killed one goes on."""
    from cacp_ray.distributed.cluster import check_address, connect
    from cacp_ray.distributed.converting import convert

    if kind != "imagefolder":
        raise ConfigError(f"data convert {kind}: only imagefolder can be converted")
    check_address(address)
    connect(address)
    rows = convert(
        source,
        out,
        shards,
        prefix,
        lambda done, total: None if state["quiet"] else typer.echo(f"shard {done:,}/{total:,}"),
    )
    typer.echo(f"{rows:,} images in {shards:,} shards: {out}")


def _percent(accuracy: Any) -> str:
    error = 100 * accuracy.standard_error
    return f"{100 * accuracy.top1:.2f} % (standard error {error:.2f}, {accuracy.images} images)"


def _search(settings: Any, folder: Path, **options: Any) -> None:
    from cacp_ray import api
    from cacp_ray.reporting.progress import SearchDisplay

    with SearchDisplay(quiet=state["quiet"]) as display:
        api.search(settings, folder, on_progress=display.update, **options)


def _search_each(
    settings: Any,
    names: list[str],
    run_dir: Path | None,
    *,
    resume: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    from cacp_ray import api
    from cacp_ray.reporting.progress import SearchDisplay

    folder = run_dir or Path("runs") / settings.name
    series = api.plan_series(settings, names, folder, resume=resume)
    about = api.check_series(series)
    if dry_run:
        typer.echo(f"{about}: {', '.join(map(str, series.configs))}")
        return
    for number, (path, config) in enumerate(series.configs.items(), start=1):
        logger.info("strategy %s, %d of %d: %s", config.strategy, number, len(names), path)
        with SearchDisplay(quiet=state["quiet"]) as display:
            run = series.search(path, on_progress=display.update, **options)
        logger.info("report: %s", run.report())
    _compare(list(series.configs), folder / "comparison")


def _compare(runs: list[Path], out: Path) -> None:
    from cacp_ray.api import compare, write_comparison
    from cacp_ray.reporting.comparison import comparison_table
    from cacp_ray.reporting.tables import make_console

    comparison = compare(runs)
    console = make_console()
    console.print(comparison_table(comparison, console.width))
    typer.echo(f"written: {', '.join(map(str, write_comparison(comparison, out)))}")


def _finetune(folder: Path, **options: Any) -> dict[str, Any]:
    from cacp_ray import api
    from cacp_ray.reporting.progress import FinetuneDisplay

    with FinetuneDisplay(quiet=state["quiet"]) as display:
        return api.finetune(folder, on_epoch=display.update, **options)


def _report(folder: Path) -> None:
    from cacp_ray.api import read_run_config
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


def main() -> None:
    """Entry point: one line and exit code 2 for bad input, 1 for a failed run."""
    try:
        code = app(standalone_mode=False) or 0
        if code == INTERRUPTED:  # typer turns Ctrl-C into this exit code
            typer.echo("cacp-ray: interrupted; go on with --resume", err=True)
        sys.exit(code)
    except Exception as error:
        if "--debug" in sys.argv:
            raise
        code, text = _explain(error)
        typer.echo(text, err=True)
        sys.exit(code)


def _explain(error: Exception) -> tuple[int, str]:
    """Exit code and what is printed."""
    if isinstance(error, CacpError):
        return error.exit_code, f"cacp-ray: {error}"
    if (usage := getattr(error, "format_message", None)) is not None:  # typer's: wrong usage
        text = usage()
        return 2, text if "\n" in text else f"cacp-ray: {text} See cacp-ray --help."
    reason = " ".join(str(error).split())
    return 1, f"cacp-ray: {type(error).__name__}: {reason} (cacp-ray --debug shows where)"


if __name__ == "__main__":
    main()
