"""What all benchmarks print, and a log of results that survives a kill."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cacp_ray.files import describe_environment

RESAMPLES = 2000


def bootstrap(gains: np.ndarray) -> tuple[float, float]:
    """2.5 and 97.5 % quantiles of the mean of resampled images; gains (images,)."""
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(gains), np.full(len(gains), 1 / len(gains)), size=RESAMPLES)
    low, high = np.quantile(counts @ gains / len(gains), [0.025, 0.975])
    return float(low), float(high)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A Markdown table under a bold title."""
    print(f"\n**{title}**\n")
    for row in [header, ["---"] * len(header), *rows]:
        print(f"| {' | '.join(row)} |")


def print_environment(seed: int) -> None:
    """One line: commit, seed and machine."""
    found = describe_environment(seed)
    print(
        f"\nCommit {found['commit']}, seed {seed}, {found['processor']} with {found['cpus']} CPUs, "
        f"{torch.get_num_threads()} torch thread(s), torch {found['packages']['torch']}."
    )


def positive(text: str) -> int:
    """An option that counts something."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def parse_rows(text: str) -> tuple[int, int]:
    """An option START:STOP."""
    start, stop = map(int, text.split(":"))
    return start, stop


def read_rows(log: Path) -> list[dict[str, Any]]:
    """Rows of a JSONL file; one that a kill cut short is left out."""
    rows = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def append_row(log: Path, row: dict[str, Any]) -> None:
    """Adds a row to a JSONL file at once, on a line of its own."""
    log.parent.mkdir(parents=True, exist_ok=True)
    is_cut = log.exists() and not log.read_bytes().endswith(b"\n")
    with log.open("a") as file:
        file.write("\n" * is_cut + json.dumps(row) + "\n")
