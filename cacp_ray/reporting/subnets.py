"""What the subnet folders of a run tell: how fine-tuning went, and who came after the search."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from cacp_ray.files import read_object
from cacp_ray.pruning.subnet import read_description
from cacp_ray.reporting.figures import limit_y, rate_colours, rate_legend, style

Metrics = dict[float, dict[str, Any]]  # rate -> content of metrics.json


def read_metrics(run_dir: Path, result: dict[str, Any]) -> Metrics:
    """The metrics.json of every fine-tuned rate that has one with all epochs, smallest first.

    Raises:
        ArtifactError: One is unreadable.
    """
    rows = sorted(result["rates"], key=lambda row: row["rate"])
    files = {row["rate"]: run_dir / row["path"] / "metrics.json" for row in rows}
    found = {rate: read_object(file, ("epochs",)) for rate, file in files.items() if file.exists()}
    return {
        rate: each for rate, each in found.items() if len(each.get("history", [])) == each["epochs"]
    }


def find_later(run_dir: Path, result: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the subnets that `cacp-ray subnet` saved in the run, as `answer_columns` takes them.

    Raises:
        ArtifactError: One is unreadable.
    """
    known = {row["path"] for row in result["rates"]}
    files = sorted((run_dir / "subnets").glob("*/subnet.json"))
    paths = [file.parent.relative_to(run_dir).as_posix() for file in files]
    rows = []
    for path in (path for path in paths if path not in known):
        found = read_description(run_dir / path)
        scored = found.get("candidates", {})
        rows.append(
            {key: found[key] for key in ("rate", "cost_kept", "macs")}
            | {"policy_top1": scored.get("policy_top1"), "scored_top1": scored.get("search_top1")}
            | {"path": path, "top1": found.get("search", {}).get("top1")}
        )
    return rows


def plot_finetuning(axes: Axes, result: dict[str, Any], metrics: Metrics) -> str:
    """Top-1 on the search split after every epoch; returns the caption."""
    shown: list[float] = []
    epochs = 0
    for (rate, found), colour in zip(metrics.items(), rate_colours(len(metrics)), strict=True):
        values = [100 * found["search_top1_before"]]
        values += [100 * epoch["search_top1"] for epoch in found["history"]]
        axes.plot(range(len(values)), values, color=colour, label=f"{rate:.2f}")
        best = found["best_epoch"]
        axes.plot([best], [values[best]], color=colour, marker="o")
        shown += values
        epochs = max(epochs, len(values) - 1)
    top1 = (result["base"].get("search") or {}).get("top1")
    if top1 is not None:
        axes.axhline(100 * top1, color="black", linestyle=":", linewidth=1.3)
        shown.append(100 * top1)
    limit_y(axes, np.array(shown), np.empty(0))
    axes.set_xlim(0, max(1, epochs) * 1.02)
    style(axes, "epochs", "top-1, search split (%)")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, min_n_ticks=1))
    rate_legend(axes)
    whole = " Dotted: the base network." if top1 is not None else ""
    return f"From the network as the search left it. Dot: the epoch whose weights are kept.{whole}"
