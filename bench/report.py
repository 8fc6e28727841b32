"""Tables and environment that all benchmarks print, and a log of results that survives a kill."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cacp_ray.io.environment import describe_environment
from cacp_ray.io.jsonl import append_line, read_lines

RESAMPLES = 2000


def bootstrap(gains: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % quantiles of the mean of resampled images; gains (images,)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=RESAMPLES)
    low, high = np.quantile(counts @ gains / len(gains), [0.025, 0.975])
    return float(low), float(high)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a Markdown table under a bold title."""
    print(f"\n**{title}**\n")
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")


def print_environment(seed: int) -> None:
    """Prints one line with commit, seed and machine."""
    here = describe_environment(seed)
    print(
        f"\nCommit {here['commit']}, seed {seed}, {here['processor']} with {here['cpus']} CPUs, "
        f"{torch.get_num_threads()} torch thread(s), torch {here['packages']['torch']}."
    )


def positive(text: str) -> int:
    """Parses an option that is a number above 0."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parse_rows(text: str) -> tuple[int, int]:
    """Parses an option START:STOP."""
    start, stop = map(int, text.split(":"))
    return start, stop


def read_rows(log: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file, without one that a kill cut short."""
    return read_lines(log)[0]


def append_row(log: Path, row: dict[str, Any]) -> None:
    """Adds a row to a JSONL file at once, on a line of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    append_line(log, json.dumps(row))
