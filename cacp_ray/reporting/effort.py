"""The effort of a run: time of its phases, and the work of its evaluators and trials."""

from typing import Any

import numpy as np
import pyarrow as pa

from cacp_ray.reporting.figures import Metrics
from cacp_ray.reporting.summary import format_percent, format_seconds

PHASES = {
    "start": "cluster and statistics",
    "prepare": "data and channel groups",
    "search": "search",
    "frontier": "policy's answers",
    "cuts": "cuts of the trained",
    "build": "winners",
    "finetune": "fine-tuning",
}
Fact = tuple[str, str]  # name, text


def list_phases(seconds: dict[str, float | None]) -> list[dict[str, Any]]:
    """Name and duration of each phase, and the length of its bar in percent of the longest."""
    longest = max((s for s in seconds.values() if s is not None), default=0.0)
    return [
        {
            "name": PHASES.get(name, name),
            "text": format_seconds(value),
            "width": round(100 * value / longest, 1) if value and longest else 0,
        }
        for name, value in seconds.items()
    ]


def list_facts(result: dict[str, Any], episodes: pa.Table, metrics: Metrics) -> list[Fact]:
    """Measurements, evaluators, scoring time and fine-tuning of a run."""
    if episodes.num_rows == 0:
        return [("measurements", "none is recorded")]
    columns = ("status", "cached", "evaluator", "node", "seconds", "images")
    status, cached, evaluators, nodes, seconds, images = (
        episodes[name].to_numpy() for name in columns
    )
    is_own = ~cached.astype(bool)  # cached ones took no time
    is_scored = is_own & (status == "ok")
    num_evaluators, num_nodes = len(set(evaluators[is_own])), len(set(nodes[is_own]))
    num_failed, num_stopped = (int((status == kind).sum()) for kind in ("failed", "stopped"))
    recorded = f"{len(status):,} recorded, {cached.sum():,} answered from memory"
    stopped = f", {num_stopped:,} stopped early" if num_stopped else ""
    processes = _plural(num_evaluators, "process", "processes")
    facts = [
        ("measurements", f"{recorded}, {num_failed:,} failed{stopped}"),
        ("evaluators", f"{processes} on {_plural(num_nodes, 'node', 'nodes')}"),
    ]
    if is_scored.any():
        most = images[is_scored].max()
        median = format_seconds(float(np.median(seconds[is_scored])))
        busy = float(seconds[is_own].sum())
        searched = result["seconds"].get("search")
        share = format_percent(busy / (searched * num_evaluators) if searched and busy else None, 0)
        spent = f"{format_seconds(busy)} of all evaluators, {share} % of the time of the search"
        on = f" on {most:,} images" if most else ""
        facts += [
            ("a candidate", f"{median} (median) to build, repair and score{on}"),
            ("scoring", spent),
        ]
    if metrics:
        epochs = sum(content["epochs"] for content in metrics.values())
        spent = format_seconds(sum(content["seconds"] for content in metrics.values()))
        networks = _plural(len(metrics), "network", "networks")
        facts.append(
            ("fine-tuning", f"{networks}, {_plural(epochs, 'epoch', 'epochs')}, {spent} in trials")
        )
    return facts


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
