"""Commands that search: demo, search, tune-agent, compare."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cacp_ray.cli.app import app, state
from cacp_ray.cli.networks import run_finetune
from cacp_ray.cli.options import Address, Overrides, Resume, RunDir, Storage
from cacp_ray.cli.results import print_report
from cacp_ray.errors import ConfigError
from cacp_ray.searching.strategies import ALL_STRATEGIES

if TYPE_CHECKING:
    from cacp_ray.api import Run
    from cacp_ray.config.run import RunConfig

logger = logging.getLogger(__name__)

Settings = Annotated[
    list[str] | None,
    typer.Argument(metavar="[CONFIG] [KEY=VALUE]...", help="YAML file, and settings as a.b=1."),
]


@app.command()
def demo(run_dir: RunDir = None, resume: Resume = False) -> None:
    """Search, fine-tune and report on the embedded CIFAR-10 sample, in minutes on a laptop."""
    from cacp_ray.config.run import RunConfig

    names = (Path("runs") / f"demo{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    folder = run_dir or next(path for path in names if resume or not path.exists())
    _search(RunConfig(name="demo"), folder, resume=resume)
    typer.echo(
        f"fine-tuning on Ray Tune; go on after a stop: cacp-ray demo --run-dir {folder} --resume"
    )
    run_finetune(folder, resume=resume)
    print_report(folder)


@app.command("run")
def run_all(
    settings: Settings = None,
    run_dir: RunDir = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    storage: Storage = None,
) -> None:
    """The whole job: search, fine-tune all rates, and report.

    Give a YAML file, such as tune_configs/quickstart.yaml, or key=value settings, or both.
    """
    config = _read_settings(settings, overrides)
    folder = run_dir or Path("runs") / config.name
    run = _search(config, folder, resume=resume, address=address, storage=storage)
    typer.echo("fine-tuning on Ray Tune; go on after a stop with --resume")
    run_finetune(folder, resume=resume, address=address, storage=run.mirror)
    print_report(folder)
    if run.mirror is not None:
        run.mirror.finish(folder)  # the report too


@app.command()
def search(
    settings: Settings = None,
    run_dir: RunDir = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME[,NAME...]",
            help=f"{', '.join(ALL_STRATEGIES)}, or package.module:function; with several, "
            "--run-dir gets one run for each, and their comparison.",
        ),
    ] = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    cache: Annotated[
        Path | None, typer.Option("--cache", help="Folder of measurements that runs share.")
    ] = None,
    storage: Storage = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all input and print what the search would do.")
    ] = False,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="Price of one core (or GPU, if GPUs score) for an hour; --dry-run then prints "
            "what the search would cost.",
        ),
    ] = None,
) -> None:
    """Search a smaller network for every rate, all in one search.

    Give a YAML file, such as tune_configs/quickstart.yaml, or key=value settings, or both.
    """
    if price is not None and not dry_run:
        raise ConfigError("--price needs --dry-run: give both")
    changes, names = list(overrides or []), strategy.split(",") if strategy else []
    if len(names) > 1 and storage:
        raise ConfigError("--storage holds one run: search with one --strategy")
    if len(names) == 1:
        changes.append(f"strategy={strategy}")
    config = _read_settings(settings, changes)
    folder = run_dir or Path("runs") / config.name
    if len(names) > 1:
        options = {"address": address, "cache": cache}
        _search_each(config, names, folder, resume=resume, dry_run=dry_run, **options)
    elif dry_run:
        from cacp_ray.workflows.dry_run import check_search

        typer.echo(check_search(config, folder, resume=resume, address=address, price=price))
    else:
        options = {"address": address, "cache": cache, "storage": storage}
        run = _search(config, folder, resume=resume, **options)
        print_report(folder)
        if run.mirror is not None:
            run.mirror.finish(folder)  # the report too


@app.command()
def tune_agent(
    config: Annotated[Path, typer.Argument(help="YAML file, such as tune_configs/agent_asha.yaml")],
    run_dir: RunDir = None,
    overrides: Overrides = None,
    address: Address = None,
    resume: Resume = False,
    storage: Storage = None,
) -> None:
    """Find the agent settings that search best on a network, with Ray Tune."""
    from cacp_ray import api
    from cacp_ray.config.agent_tuning import AgentTuningConfig
    from cacp_ray.config.reading import load_config
    from cacp_ray.reporting.displays import TuningDisplay
    from cacp_ray.reporting.tables import make_console
    from cacp_ray.reporting.tuning import tuning_table

    settings = load_config(AgentTuningConfig, config, overrides or [])
    folder = run_dir or Path("runs") / settings.name
    display = TuningDisplay(settings.trials, settings.objective, quiet=state["quiet"])
    with display:
        options = {"address": address, "resume": resume, "storage": storage}
        result = api.tune_agent(settings, folder, on_progress=display.update, **options)
    make_console().print(tuning_table(result))
    cache = "" if settings.search.task else f" --cache {folder / 'cache'}"  # knows images alone
    typer.echo(f"best settings: cacp-ray search {folder / 'best.yaml'}{cache}")
    typer.echo(f"report: {folder / 'report.html'}")


@app.command()
def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN", help="Run directories, or folders of run directories."),
    ],
    out: Annotated[
        Path,
        typer.Option(help="Folder for comparison.png, .svg and .json; an earlier one is replaced."),
    ] = Path("comparison"),
) -> None:
    """Compare runs on the same network and data: accuracy, evaluations, time."""
    from cacp_ray.reporting.comparison_figure import check_out

    check_out(out)
    _compare(runs, out)


def _read_settings(given: list[str] | None, overrides: list[str] | None) -> "RunConfig":
    """The configuration of a file, if one is given, with single settings changed."""
    from cacp_ray.config.reading import load_config
    from cacp_ray.config.run import RunConfig

    words = given or []
    files = [word for word in words if "=" not in word or Path(word).exists()]
    if not words and not overrides:
        raise ConfigError(
            "nothing to search: give a YAML file (cacp-ray init writes one), or settings, such as "
            "model.name=torchvision:resnet18"
        )
    if len(files) > 1:
        raise ConfigError(f"{files[1]}: give one YAML file, and settings as key=value")
    changes = [word for word in words if word not in files] + list(overrides or [])
    if files:
        return load_config(RunConfig, Path(files[0]), changes)
    config = load_config(RunConfig, {}, changes)
    if "name" in config.model_fields_set:
        return config
    short = re.sub(r"[^A-Za-z0-9]+", "-", config.model.name.rpartition(":")[2]).strip("-")
    return config.model_copy(update={"name": short or config.name})


def _search(settings: Any, folder: Path, **options: Any) -> "Run":
    from cacp_ray import api
    from cacp_ray.reporting.displays import SearchDisplay

    with SearchDisplay(quiet=state["quiet"]) as display:
        return api.search(settings, folder, on_progress=display.update, **options)


def _search_each(
    settings: Any, names: list[str], folder: Path, *, resume: bool, dry_run: bool, **options: Any
) -> None:
    from cacp_ray.reporting.displays import SearchDisplay
    from cacp_ray.workflows.series import check_series, plan_series

    series = plan_series(settings, names, folder, resume=resume)
    about = check_series(series)
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
    from cacp_ray.reporting.comparison_figure import write_comparison
    from cacp_ray.reporting.comparison_table import comparison_table
    from cacp_ray.reporting.tables import make_console
    from cacp_ray.workflows.compare import compare

    comparison = compare(runs)
    make_console().print(comparison_table(comparison))
    typer.echo(f"written: {', '.join(map(str, write_comparison(comparison, out)))}")
