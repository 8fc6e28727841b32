"""The report of a finished run: report.html and its figures."""

import dataclasses
from pathlib import Path
from typing import Any

import pyarrow as pa

from cacp_ray.io.files import parse_yaml, read_text, to_yaml
from cacp_ray.io.rates import format_rate
from cacp_ray.io.schema import Content, read_checked
from cacp_ray.pruning.subnet import loading_code, read_description
from cacp_ray.reporting.benchmark import (
    benchmark_columns,
    conclude,
    describe_benchmark,
    plot_benchmark,
)
from cacp_ray.reporting.effort import list_facts, list_phases
from cacp_ray.reporting.figures import (
    Drawing,
    Metrics,
    Plot,
    Save,
    plot_accuracy,
    plot_finetuning,
    plot_latency,
    plot_progress,
    read_episodes,
    save_figure,
    save_plots,
)
from cacp_ray.reporting.groups import (
    fit_importance,
    plot_importance,
    plot_keep_counts,
    plot_keep_ratios,
)
from cacp_ray.reporting.html import write_page
from cacp_ray.reporting.learning import draw_learning
from cacp_ray.reporting.summary import (
    Column,
    Row,
    accuracy_columns,
    answer_columns,
    format_macs,
    format_seconds,
    frontier_columns,
    has_latency,
    metric_of,
    short_columns,
    size_columns,
    standard_errors,
    summary_rows,
    words,
)
from cacp_ray.rundir.directory import RunDirectory, read_result
from cacp_ray.rundir.schema import (
    BENCHMARK_FILE,
    BenchmarkFile,
    MetricsFile,
    ReportedFile,
    read_learning,
)

# What the figure and the facts of a fine-tuning read.
SHOWN_METRICS = ("best_epoch", "search_score_before", "seconds", "history")


def report_run(run_dir: Path) -> Path:
    """Writes report.html and the figures of a finished search; returns the path of the report."""
    read_result(run_dir, ReportedFile)
    # The policy's answers after the search are told apart from what it has searched.
    records = [row for row in RunDirectory(run_dir).read_records() if not row.is_answer]
    table = pa.Table.from_pylist([dataclasses.asdict(record) for record in records])
    return write_report(run_dir, table)


def write_report(run_dir: Path, episodes: pa.Table, save: Save = save_figure) -> Path:
    """Writes the report from result.json, environment.json, config.yaml, and learning.jsonl if any.

    The report shows the path of the run as given, and is returned as a path.

    Raises:
        ArtifactError: One of the first three files is missing or unreadable.
    """
    result = read_result(run_dir, ReportedFile)
    environment = read_checked(run_dir / "environment.json", Content)
    config = _read_config(run_dir)
    metrics = read_metrics(run_dir, result)
    folder, lines = run_dir / "figures", read_learning(run_dir)
    rows, later = summary_rows(result), list_later_answers(run_dir, result)
    timed = read_benchmark(run_dir)
    drawings = draw_figures(result, episodes, metrics, folder, save, timed)
    learning = draw_learning(result, lines, folder, save)
    return write_page(
        run_dir / "report.html",
        "report.html.jinja",
        result=result,
        metric=metric_of(result),
        base_macs=format_macs(result["base"]["macs"]),
        short=_cells(short_columns(result), rows),
        size=_cells(size_columns(result), rows),
        accuracy=_cells(accuracy_columns(result), rows),
        frontier=_cells(frontier_columns(result), result["frontier"]),
        errors=standard_errors(result),
        words=words(result),
        has_latency=has_latency(result),
        has_importance=any(drawing.path.stem == "importance" for drawing in drawings),
        figures=drawings,
        benchmark=None if timed is None else _cells(benchmark_columns(timed), timed["rows"]),
        benchmark_words="" if timed is None else describe_benchmark(timed),
        benchmark_conclusions=[] if timed is None else conclude(timed),
        learning=learning,
        loading=_loading(run_dir, rows[1:], result["base"].get("model", "")),
        later=_loading(run_dir, later, result["base"].get("model", "")),
        later_answers=_cells(answer_columns(result, later), later),
        has_finetuned=any(row.get("finetuned_score") is not None for row in rows[1:]),
        phases=list_phases(result["seconds"]),
        total_seconds=format_seconds(sum(s for s in result["seconds"].values() if s is not None)),
        facts=list_facts(result, episodes, metrics),
        environment=_flatten(environment),
        config=config,
        rates=rows[1:],
    )


def _read_config(run_dir: Path) -> str:
    """The configuration as text; a task of the user's own reads no images, so `data` is left out.

    Raises:
        ArtifactError: The file is missing or unreadable.
    """
    text = read_text(run_dir / "config.yaml")
    try:
        values = parse_yaml(text)
    except ValueError:
        return text
    if not isinstance(values, dict) or values.get("task") is None:
        return text
    return to_yaml({name: value for name, value in values.items() if name != "data"})


def draw_figures(
    result: dict[str, Any],
    episodes: pa.Table,
    metrics: Metrics,
    folder: Path,
    save: Save = save_figure,
    timed: dict[str, Any] | None = None,
) -> list[Drawing]:
    """Writes the PNG and SVG files of a run; `timed` is the content of benchmark.json."""
    scored = read_episodes(episodes)
    what = "Accuracy" if metric_of(result).is_share else "Score"
    plots: list[tuple[str, str, Plot]] = [
        ("accuracy", f"{what} against cost", lambda axes: plot_accuracy(axes, result, scored)),
        ("learning", "Progress of the search", lambda axes: plot_progress(axes, result, scored)),
        ("keep-ratios", "Where channels were cut", lambda axes: plot_keep_ratios(axes, result)),
        ("keep-counts", "How many channels stay", lambda axes: plot_keep_counts(axes, result)),
    ]
    if has_latency(result):
        speed: Plot = lambda axes: plot_latency(axes, result)  # noqa: E731
        plots.insert(1, ("latency", f"{what} against speed", speed))
    if timed is not None:
        deployed: Plot = lambda axes: plot_benchmark(axes, timed)  # noqa: E731
        plots.insert(1, ("benchmark", f"{what} against speed where it is deployed", deployed))
    if metrics:
        draw: Plot = lambda axes: plot_finetuning(axes, result, metrics)  # noqa: E731
        plots.insert(-2, ("finetuning", "Fine-tuning", draw))
    if (importance := fit_importance(result, episodes)) is not None:
        title = "Which channels matter"
        plots.append(("importance", title, lambda axes: plot_importance(axes, result, importance)))
    return save_plots(plots, folder, save=save)


def read_metrics(run_dir: Path, result: dict[str, Any]) -> Metrics:
    """The metrics.json of every completely fine-tuned rate, by rate, smallest first.

    Raises:
        ArtifactError: A file is unreadable.
    """
    metrics: Metrics = {}
    for row in sorted(result["rates"], key=lambda row: row["rate"]):
        file = run_dir / row["path"] / "metrics.json"
        content = read_checked(file, MetricsFile) if file.exists() else {}
        if content.get("epochs") is None:  # a training elsewhere says what it likes
            continue
        content = read_checked(file, MetricsFile, SHOWN_METRICS)
        if len(content["history"]) == content["epochs"]:
            metrics[row["rate"]] = content
    return metrics


def read_benchmark(run_dir: Path) -> dict[str, Any] | None:
    """The content of benchmark.json; None where nothing was benchmarked.

    Raises:
        ArtifactError: The file is unreadable.
    """
    file = run_dir / BENCHMARK_FILE
    return read_checked(file, BenchmarkFile) if file.exists() else None


def list_later_answers(run_dir: Path, result: dict[str, Any]) -> list[Row]:
    """Rows of `answer_columns` for the subnets that `cacp-ray subnet` saved in the run.

    Raises:
        ArtifactError: A subnet is unreadable.
    """
    known = {row["path"] for row in result["rates"]}
    rows: list[Row] = []
    for file in sorted((run_dir / "subnets").glob("*/subnet.json")):
        path = file.parent.relative_to(run_dir).as_posix()
        if path in known:
            continue
        description = read_description(run_dir / path, "rate", "cost_kept", "macs")
        scored = description.get("candidates", {})
        rows.append(
            {key: description[key] for key in ("rate", "cost_kept", "macs")}
            | {
                "policy_score": scored.get("policy_score"),
                "scored_score": scored.get("search_score"),
            }
            | {"path": path, "score": description.get("search", {}).get("score")}
        )
    return rows


def _cells(columns: list[Column], rows: list[Row]) -> dict[str, Any]:
    return {"columns": columns, "rows": [[column.text(row) for column in columns] for row in rows]}


def _loading(run_dir: Path, rows: list[Row], model: str) -> list[dict[str, str]]:
    """Python code that loads the subnet of each row."""
    return [
        {"label": format_rate(row["rate"]), "code": loading_code(run_dir / row["path"], model)}
        for row in rows
    ]


def _flatten(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Names and values; nested objects are replaced by their content."""
    pairs: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, dict):
            pairs += _flatten(value)
        else:
            pairs.append((name, "unknown" if value is None else str(value)))
    return pairs
