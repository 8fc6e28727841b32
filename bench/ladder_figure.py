"""The ladder in one figure: python bench/ladder_figure.py RESULTS --method "uniform l1" --out FILE.

RESULTS holds what bench/finetune.py wrote. Top-1 on the search split, as the mean over seeds:
subnets cut from the base network and repaired, trained side by side, and down the ladder, with its
cuts and the networks that are cut between the rates without training.
"""

import argparse
import itertools
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from cacp_ray.io.files import read_json
from cacp_ray.reporting.figures import BLUE, DPI, GREY, ORANGE, style


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--method", default="uniform l1")
    parser.add_argument("--out", type=Path, required=True, help="PNG file")
    options = parser.parse_args()
    arms = {
        order: read_arm(options.results, f"{options.method} {order}")
        for order in ("parallel", "ladder")
    }
    figure = Figure(figsize=(6.4, 4.2), dpi=DPI, layout="constrained")
    draw(figure.add_subplot(), arms)
    figure.savefig(options.out, metadata={"Software": None})
    print(f"written: {options.out}, {len(arms['ladder'])} seed(s)")


def read_arm(folder: Path, arm: str) -> list[dict[str, Any]]:
    return [read_json(file) for file in sorted(folder.glob(f"{arm.replace(' ', '-')}-seed-*.json"))]


def mean_of(results: list[dict[str, Any]], key: str) -> dict[float, float]:
    """Mean over seeds in %, by rate."""
    rows = [row for result in results for row in result["rates"]]
    rates = sorted({row["rate"] for row in rows})
    return {
        rate: float(np.mean([100 * row[key] for row in rows if row["rate"] == rate]))
        for rate in rates
    }


def draw(axes: Any, arms: dict[str, list[dict[str, Any]]]) -> None:
    cut, side = (mean_of(arms["parallel"], key) for key in ("top1", "finetuned_top1"))
    start, trained = (mean_of(arms["ladder"], key) for key in ("start_top1", "finetuned_top1"))
    axes.plot(cut.keys(), cut.values(), ":x", color=GREY, label="cut from the base, repaired")
    axes.plot(side.keys(), side.values(), "-o", color=BLUE, label="trained side by side")
    rates = sorted(trained, reverse=True)
    for larger, rate in itertools.pairwise(rates):
        axes.plot(
            [larger, rate], [trained[larger], start[rate]], "--", color=ORANGE, linewidth=1.2,
            label="cut from the next larger trained" if larger == rates[0] else None,
        )  # fmt: skip
        axes.annotate(
            "", (rate, trained[rate]), (rate, start[rate]),
            arrowprops={"arrowstyle": "->", "color": ORANGE, "linewidth": 1.6},
        )  # fmt: skip
    axes.plot(trained.keys(), trained.values(), "s", color=ORANGE, label="trained down the ladder")
    between: dict[float, list[float]] = {}
    for result in arms["ladder"]:
        for row in result["trained_frontier"]:
            between.setdefault(row["rate"], []).append(100 * row["score"])
    axes.plot(
        between.keys(), [np.mean(scores) for scores in between.values()], "D", color=ORANGE,
        markerfacecolor="white", label="other rates, cut without training",
    )  # fmt: skip
    style(axes, "rate: share of the MACs kept", "top-1, search split (%)")
    axes.legend(fontsize=9, frameon=False, loc="lower right")


if __name__ == "__main__":
    main()
