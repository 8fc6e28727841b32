"""What a run took: the time of its phases, and what its evaluators and trials did."""

import math
from typing import Any

import numpy as np
import pyarrow as pa

from cacp_ray.reporting.subnets import Metrics
from cacp_ray.reporting.summary import format_number, format_seconds

PHASES = {
    "start": "cluster and statistics",
    "prepare": "data and channel groups",
    "search": "search",
    "frontier": "policy's answers",
    "build": "winners",
    "finetune": "fine-tuning",
}
Fact = tuple[str, str]  # name, text


def list_phases(seconds: dict[str, float | None]) -> list[dict[str, Any]]:
    """Name, duration, and length of a bar in percent of the longest."""
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
    """What was used, and what for.

    Args:
        result: Content of result.json.
        episodes: All measurements of the run.
        metrics: Of the rates that are fine-tuned.
    """
    if episodes.num_rows == 0:
        return [("measurements", "none is recorded")]
    columns = ("status", "cached", "evaluator", "node", "seconds", "images")
    status, cached, evaluators, nodes, seconds, images = (
        episodes[name].to_numpy() for name in columns
    )
    is_own = ~cached.astype(bool)  # the others took no time
    is_scored = is_own & (status == "ok")
    num_evaluators, num_nodes = len(set(evaluators[is_own])), len(set(nodes[is_own]))
    num_failed, num_stopped = (int((status == kind).sum()) for kind in ("failed", "stopped"))
    stopped = f", {num_stopped:,} stopped early" if num_stopped else ""
    facts = [
        (
            "measurements",
            f"{len(status):,} recorded, {cached.sum():,} answered from memory, "
            f"{num_failed:,} failed{stopped}",
        ),
        (
            "evaluators",
            f"{_plural(num_evaluators, 'process', 'processes')} on "
            f"{_plural(num_nodes, 'node', 'nodes')}",
        ),
    ]
    if is_scored.any():
        each = format_seconds(float(np.median(seconds[is_scored])))
        busy = float(seconds[is_own].sum())
        searched = result["seconds"].get("search")
        share = 100 * busy / (searched * num_evaluators) if searched and busy else math.nan
        facts += [
            (
                "a candidate",
                f"{each} (median) to build, repair and score on {images[is_scored].max():,} images",
            ),
            (
                "scoring",
                f"{format_seconds(busy)} of all evaluators, {format_number(share, 0)} % of the "
                "time of the search",
            ),
        ]
    if metrics:
        epochs = sum(found["epochs"] for found in metrics.values())
        spent = format_seconds(sum(found["seconds"] for found in metrics.values()))
        networks = _plural(len(metrics), "network", "networks")
        facts.append(
            ("fine-tuning", f"{networks}, {_plural(epochs, 'epoch', 'epochs')}, {spent} in trials")
        )
    return facts


def _plural(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"
