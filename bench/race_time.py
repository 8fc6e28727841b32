"""Seconds that racing saves: OMP_NUM_THREADS=1 python bench/race_time.py RUN [RUN ...].

The run's own scorer scores candidates of finished searches again: each in turn to the end, and in a
race with the best network that the search knew at its rate by then. The start, the learning and the
end of a search are not timed.
"""

import argparse
import dataclasses
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from racing import ROUND_SIZE, read
from report import positive, print_environment, print_table

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import Scorer
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.workflows.evaluators import scorer_arguments
from cacp_ray.workflows.setup import Setup


def draw(rows: list[EpisodeRecord], number: int) -> list[Candidate]:
    """Evenly spaced candidates, each with the hits of the best measured before its round."""
    candidates = []
    for i in np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int):
        row, told = rows[i], rows[: i // ROUND_SIZE * ROUND_SIZE]
        rivals = [rival for rival in told if rival.rate == row.rate]
        best = max(rivals, key=lambda rival: (rival.score, -rival.index)).hits if rivals else ""
        candidates.append(dataclasses.replace(row.candidate, opponent=best))
    return candidates


def bench(run: Path, number: int) -> list[str]:
    """One row of the table."""
    setup = Setup.open(run)
    score = Scorer(**{**scorer_arguments(setup), "threads": None})
    whole, raced, images = [], [], []
    for candidate in draw(read(run), number):
        for opponent, seconds in (("", whole), (candidate.opponent, raced)):
            started = time.perf_counter()
            measured = score(dataclasses.replace(candidate, opponent=opponent))
            seconds.append(time.perf_counter() - started)
        images.append(measured.images / len(setup.search))
    return [
        run.name,
        str(len(whole)),
        f"{statistics.mean(whole):.2f} s",
        f"{statistics.mean(raced):.2f} s",
        f"{1 / statistics.mean(images):.1f}x",
        f"{sum(whole) / sum(raced):.1f}x",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    parser.add_argument("--candidates", type=positive, default=60, help="for each run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [bench(run, options.candidates) for run in options.runs]
    header = [
        "search", "candidates", "whole, mean", "raced, mean", "times fewer images",
        "times more candidates a second",
    ]  # fmt: skip
    print_table("The same candidates, scored whole and raced, on one core", header, rows)
    print_environment(0)


if __name__ == "__main__":
    main()
