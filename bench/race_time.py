"""Seconds that racing saves: OMP_NUM_THREADS=1 python bench/race_time.py RUN [RUN ...].

Candidates of finished searches are scored again by the run's own scorer, every one in turn to the
end and in a race with the best that the search knew by then at its rate. Start, learning and the
search's end are left out.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch
from racing import ROUND_SIZE, read
from report import positive, print_environment, print_table

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.scorer import make_scorer
from cacp_ray.evaluators import scorer_arguments
from cacp_ray.files import read_object
from cacp_ray.folders import read_run_config
from cacp_ray.loading import find_statistics, load_base, prepare_base, read_orders
from cacp_ray.searching.records import EpisodeRecord


def draw(rows: list[EpisodeRecord], number: int) -> list[Candidate]:
    """Every nth of a search, each with the hits of the best told before its round."""
    candidates = []
    for i in np.linspace(0, len(rows) - 1, min(number, len(rows))).astype(int):
        row, told = rows[i], rows[: i // ROUND_SIZE * ROUND_SIZE]
        rivals = [each for each in told if each.rate == row.rate]
        best = max(rivals, key=lambda each: (each.top1, -each.index)).hits if rivals else ""
        candidates.append(
            Candidate(row.index, row.rate, row.keep_counts, order=row.order, best=best)
        )
    return candidates


def bench(run: Path, number: int) -> list[str]:
    """One row of the table."""
    config = read_run_config(run)
    base = load_base(config)
    model = read_object(run / "model.json", ("groups",))
    found = find_statistics(base, config, run)
    prepared = prepare_base(base, config, read_orders(model), found)
    score = make_scorer(**{**scorer_arguments(config, base, prepared), "threads": None})
    whole, raced, images = [], [], []
    for candidate in draw(read(run), number):
        for best, seconds in (("", whole), (candidate.best, raced)):
            started = time.perf_counter()
            measured = score(
                Candidate(
                    candidate.index, candidate.rate, candidate.keep_counts,
                    order=candidate.order, best=best,
                )
            )  # fmt: skip
            seconds.append(time.perf_counter() - started)
        images.append(measured.images / len(base.search))
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
    parser.add_argument("--candidates", type=positive, default=60, help="of each run")
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
