"""A made-up run: round numbers that no network produced."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from cacp_ray.io.files import write_json, write_yaml

BASE_MACS = 40_000_000
BASE_PARAMS = 272_000
RATES = (0.3, 0.5, 0.7)


def make_result(
    rates: tuple[float, ...] = RATES,
    *,
    num_groups: int = 12,
    is_finetuned: bool = True,
    num_frontier: int = 6,
) -> dict[str, Any]:
    """Content of result.json."""
    groups = [
        {"name": f"layer{g}.conv1", "num_channels": 16 * (1 + g % 4), "is_residual": g % 4 == 0}
        for g in range(num_groups)
    ]
    return {
        "name": "synthetic",
        "strategy": "cacp",
        "cost": "macs",
        "metric": {"name": "top-1", "is_share": True},
        "base": {
            "model": "resnet20",
            "macs": BASE_MACS,
            "params": BASE_PARAMS,
            "search": {"score": 0.92, "top5": 0.99, "loss": 0.3, "images": 5000},
            "test": {"score": 0.91, "top5": 0.99, "loss": 0.3, "images": 10000},
            "latency_ms": 2.0,
            "batch_latency_ms": 90.0,
        },
        "latency_batch": 64,
        "rates": [_make_rate(rate, groups, is_finetuned=is_finetuned) for rate in rates],
        "frontier": [
            {
                "rate": r,
                "cost_kept": r - 0.0001,
                "macs": int(r * BASE_MACS),
                "score": _score(r) - 0.02,
            }
            for r in np.linspace(0.2, 0.9, num_frontier).tolist()
        ],
        "groups": groups,
        "evaluations": 300,
        "seconds": {
            "start": 2.5,
            "prepare": 11.0,
            "search": 245.0,
            "frontier": 4.0,
            "finetune": 4000.0 if is_finetuned else None,
        },
    }


def make_own_result(**options: Any) -> dict[str, Any]:
    """Content of result.json of a task of the user's own."""
    result = make_result(**options)
    result["metric"] = {"name": "PSNR (dB)", "is_share": False}
    result["base"]["model"] = "python:Upscaler"
    for split in ("search", "test"):
        result["base"][split] = {"score": 30.5, "images": 0} if split == "search" else None
    for row in result["rates"]:
        row |= {"test_score": None, "test_images": None}
    return result


def _score(rate: float) -> float:
    return 0.92 - 0.3 * (1 - rate) ** 3


def _make_rate(rate: float, groups: list[dict[str, Any]], *, is_finetuned: bool) -> dict[str, Any]:
    return {
        "rate": rate,
        "cost_kept": rate - 0.0002,
        "macs": int(rate * BASE_MACS),
        "params": int(rate * BASE_PARAMS),
        "keep_counts": [
            max(1, round(rate**0.5 * (0.7 + 0.05 * (g % 7)) * group["num_channels"]))
            for g, group in enumerate(groups)
        ],
        "path": f"subnets/rate-{rate:.2f}",
        "score": _score(rate),
        "uniform_score": _score(rate) - 0.04,
        "policy_score": _score(rate) - 0.03,
        "search_score": _score(rate) - 0.02,
        "policy_recovered_score": _score(rate) - 0.01,
        "search_recovered_score": _score(rate) - 0.005,
        "finetuned_score": _score(rate) + 0.7 * (0.92 - _score(rate)) if is_finetuned else None,
        "test_score": _score(rate) + 0.6 * (0.92 - _score(rate)) if is_finetuned else None,
        "test_images": 10000,
        "latency_ms": 2.0 * rate + 0.3,
        "speedup": 2.0 / (2.0 * rate + 0.3),
        "batch_latency_ms": 90.0 * rate + 5.0,
        "batch_speedup": 90.0 / (90.0 * rate + 5.0),
    }


def make_episodes(count: int, rates: tuple[float, ...] = RATES) -> pa.Table:
    """The columns of `episodes/` that reports read; every 50th measurement failed."""
    rng = np.random.default_rng(0)
    index = np.arange(count)
    rate = np.array(rates)[index % len(rates)]
    gain = 1 - 0.15 * np.exp(-index / 80)
    score = np.clip(np.array([_score(r) for r in rate]) * gain - rng.exponential(0.02, count), 0, 1)
    return pa.table(
        {
            "index": pa.array(index, pa.int64()),
            "rate": pa.array(rate, pa.float64()),
            "cost_kept": pa.array(rate - 0.0002, pa.float64()),
            "score": pa.array(np.where(index % 50 == 49, 0.0, score), pa.float64()),
            "cached": pa.array(index % 20 == 19, pa.bool_()),
            "status": pa.array(np.where(index % 50 == 49, "failed", "ok").tolist(), pa.string()),
            "seconds": pa.array(np.where(index % 20 == 19, 0.0, 4.0), pa.float64()),
            "images": pa.array(np.full(count, 5000), pa.int64()),
            "evaluator": pa.array([f"evaluator-{i % 2}" for i in index], pa.string()),
            "node": pa.array(["local"] * count, pa.string()),
        }
    )


def make_lines(count: int, rates: tuple[float, ...] = RATES) -> list[dict[str, Any]]:
    """Lines of `learning.jsonl`; at the first one, the agent has no problem yet."""
    unseen = [round(rate - 0.1, 2) for rate in rates]
    return [
        {
            "evaluations": 7 * (i + 1),
            "critic_loss": 1 / i if i else None,
            "policy_value": 0.1 * i if i else None,
            "updates": 16 * i if i else None,
            "noise": {f"{rate:.2f}": 0.5 * 0.9**i if i else None for rate in rates},
            "cached_share": 0.1 / (i + 1),
            "reward": {f"{rate:.2f}": _score(rate) - 0.1 / (i + 1) for rate in rates},
            "policy": {f"{rate:.2f}": [1, 2] if i else None for rate in (*rates, *unseen)},
        }
        for i in range(count)
    ]


def make_learning(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The `learning` of result.json: answers at the first rate and at one not searched."""
    points = [
        {
            "evaluations": line["evaluations"],
            "rate": rate,
            "seen": is_seen,
            "score": 0.7 + 0.001 * line["evaluations"],
            "images": 1000,
        }
        for line in lines[1:]
        for rate, is_seen in ((RATES[0] - 0.1, False), (RATES[0], True))
    ]
    return {"images": 1500, "policy_score": points}


def make_metrics(row: dict[str, Any], epochs: int = 8) -> dict[str, Any]:
    """Content of the metrics.json of a fine-tuned subnet."""
    before, best = row["score"], row["finetuned_score"]
    score = [best - (best - before) * 0.5**epoch for epoch in range(1, epochs)]
    return {
        "epochs": epochs,
        "best_epoch": epochs - 1,
        "search_score_before": before,
        "history": [{"search_score": value} for value in (*score, score[-1] - 0.001)],
        "seconds": 1200.0,
    }


def make_run(
    folder: Path, result: dict[str, Any], lines: list[dict[str, Any]] | None = None
) -> Path:
    """A run directory with the files that a report reads."""
    if lines is not None:
        folder.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "learning.jsonl").write_text(text)
    write_json(folder / "result.json", result)
    environment = {"python": "3.11.0", "packages": {"torch": "2.9"}, "commit": None, "seed": 0}
    write_json(folder / "environment.json", environment)
    write_yaml(folder / "config.yaml", {"name": result["name"], "rates": [0.3, 0.5, 0.7]})
    for row in result["rates"]:
        if row["finetuned_score"] is not None:
            write_json(folder / row["path"] / "metrics.json", make_metrics(row))
    return folder
