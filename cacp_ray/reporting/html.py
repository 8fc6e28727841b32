"""The report of a run: one HTML file that needs nothing beside it."""

import base64
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import pyarrow as pa
from markupsafe import Markup

from cacp_ray.errors import ArtifactError
from cacp_ray.files import read_object, write_file
from cacp_ray.reporting.effort import list_facts, list_phases
from cacp_ray.reporting.figures import (
    Drawing,
    Plot,
    plot_accuracy,
    plot_latency,
    plot_learning,
    read_episodes,
    save_plots,
)
from cacp_ray.reporting.layers import (
    fit_importance,
    plot_importance,
    plot_keep_counts,
    plot_keep_ratios,
)
from cacp_ray.reporting.learning import LEARNING_FILE, draw_learning, read_learning
from cacp_ray.reporting.subnets import Metrics, find_later, plot_finetuning, read_metrics
from cacp_ray.reporting.summary import (
    Column,
    Row,
    accuracy_columns,
    answer_columns,
    format_macs,
    format_seconds,
    frontier_columns,
    short_columns,
    size_columns,
    standard_errors,
    summary_rows,
    words,
)

RESULT_KEYS = ("base", "cost", "frontier", "rates", "seconds")


def write_report(run_dir: Path, episodes: pa.Table) -> Path:
    """Draws the figures and writes `report.html` from result.json, environment.json, config.yaml.

    Also from learning.jsonl, where an agent left one.

    Args:
        run_dir: Of the run; its path is written into the report as given.
        episodes: All measurements of the run, columns as in `episodes/`.

    Returns:
        Path of the report.

    Raises:
        ArtifactError: One of the three files is missing or unreadable.
    """
    if not (run_dir / "result.json").exists():
        raise ArtifactError(
            f"{run_dir} holds no result.json: finish the search first (search --resume)"
        )
    result = read_object(run_dir / "result.json", RESULT_KEYS)
    environment = read_object(run_dir / "environment.json", ())
    try:
        config = (run_dir / "config.yaml").read_text()
    except OSError as error:
        raise ArtifactError(f"{run_dir / 'config.yaml'}: {error.strerror}") from error
    metrics = read_metrics(run_dir, result)
    drawings = draw_figures(result, episodes, metrics, run_dir / "figures")
    learning = draw_learning(result, read_learning(run_dir / LEARNING_FILE), run_dir / "figures")
    page = render_page(run_dir, result, environment, config, episodes, metrics, drawings, learning)
    path = run_dir / "report.html"
    write_file(path, lambda temporary: temporary.write_text(page, encoding="utf-8"))
    return path


def draw_figures(
    result: dict[str, Any], table: pa.Table, metrics: Metrics, folder: Path
) -> list[Drawing]:
    """Writes the PNG and SVG files of a run.

    Args:
        result: Content of result.json.
        table: The episodes; columns of which rate, cost_kept, top1, status, keep_counts are read.
        metrics: Of the rates that are fine-tuned.
        folder: Where the files are written.
    """
    episodes = read_episodes(table)
    plots: list[tuple[str, str, Plot]] = [
        ("accuracy", "Accuracy against cost", lambda axes: plot_accuracy(axes, result, episodes)),
        ("latency", "Accuracy against speed", lambda axes: plot_latency(axes, result)),
        ("learning", "Progress of the search", lambda axes: plot_learning(axes, result, episodes)),
        ("keep-ratios", "Where channels were cut", lambda axes: plot_keep_ratios(axes, result)),
        ("keep-counts", "How many channels stay", lambda axes: plot_keep_counts(axes, result)),
    ]
    if metrics:
        draw: Plot = lambda axes: plot_finetuning(axes, result, metrics)  # noqa: E731
        plots.insert(3, ("finetuning", "Fine-tuning", draw))
    if (found := fit_importance(result, table)) is not None:
        title = "Which channels matter"
        plots.append(("importance", title, lambda axes: plot_importance(axes, result, *found)))
    return save_plots(plots, folder)


def render_page(
    run_dir: Path,
    result: dict[str, Any],
    environment: dict[str, Any],
    config: str,
    episodes: pa.Table,
    metrics: Metrics,
    drawings: list[Drawing],
    learning: list[Drawing],
) -> str:
    """The HTML of a report; every value is escaped.

    Args:
        run_dir: Of the run.
        result: Content of result.json.
        environment: Content of environment.json.
        config: Text of config.yaml.
        episodes: All measurements of the run.
        metrics: Of the rates that are fine-tuned.
        drawings: Figures of any run.
        learning: Figures of an agent's learning; without them there is no such section.
    """
    rows, later = summary_rows(result), find_later(run_dir, result)
    return fill_page(
        "report.html.jinja",
        result=result,
        base_macs=format_macs(result["base"]["macs"]),
        short=_cells(short_columns(result), rows),
        size=_cells(size_columns(result), rows),
        accuracy=_cells(accuracy_columns(result), rows),
        frontier=_cells(frontier_columns(result), result["frontier"]),
        errors=standard_errors(result),
        words=words(result),
        has_importance=any(drawing.path.stem == "importance" for drawing in drawings),
        figures=[embed_figure(drawing) for drawing in drawings],
        learning=[embed_figure(drawing) for drawing in learning],
        loading=_loading(run_dir, rows[1:]),
        later=_loading(run_dir, later),
        later_answers=_cells(answer_columns(result, later), later),
        has_finetuned=any(row.get("finetuned_top1") is not None for row in rows[1:]),
        phases=list_phases(result["seconds"]),
        total_seconds=format_seconds(sum(s for s in result["seconds"].values() if s is not None)),
        facts=list_facts(result, episodes, metrics),
        environment=_flatten(environment),
        config=config,
        rates=rows[1:],
    )


def _cells(columns: list[Column], rows: list[Row]) -> dict[str, Any]:
    return {
        "columns": columns,
        "rows": [[column.text(row) for column in columns] for row in rows],
    }


def fill_page(name: str, **values: Any) -> str:
    """A page that needs nothing beside it.

    Args:
        name: Of the template in this package.
        values: What it shows.
    """
    # The name ends in .jinja, so jinja2 would not know it for HTML: escaping is switched on here.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    folder = resources.files("cacp_ray.reporting")
    template = environment.from_string(folder.joinpath(name).read_text("utf-8"))
    css = Markup(folder.joinpath("report.css").read_text("utf-8"))
    return template.render(css=css, **values)


def embed_figure(drawing: Drawing) -> dict[str, str]:
    """What a template shows of a figure, the image included."""
    encoded = base64.b64encode(drawing.path.read_bytes()).decode()
    return {
        "title": drawing.title,
        "caption": drawing.caption,
        "source": f"data:image/png;base64,{encoded}",
    }


def _loading(run_dir: Path, rows: list[Row]) -> list[dict[str, str]]:
    loading = []
    for row in rows:
        path = json.dumps((run_dir / row["path"]).as_posix(), ensure_ascii=False)
        code = f"import cacp_ray\nnet = cacp_ray.load_subnet({path})"
        loading.append({"label": f"{row['rate']:.2f}", "code": code})
    return loading


def _flatten(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values; those of nested objects follow in place."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flatten(value)
        else:
            pairs.append((name, "unknown" if value is None else str(value)))
    return pairs
