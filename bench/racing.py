"""What racing saves and what it loses, from recorded searches.

OMP_NUM_THREADS=1 python bench/racing.py --search TRAIN --search-rows 45000:50000 RUN [RUN ...]

Every search recorded which images each candidate got right. Its candidates race again, in the
rounds in which they were proposed, each against the best known at its rate by then: in more or
fewer parts, with more or less patience, with the images in the order of the split or those first of
which the whole network is least sure.

`images` is the share of images that is scored. `lost` says, in points on the whole split, how much
better the best network of the whole search is than the best one that the race scored to the end.
The last table compares the estimates for stopped candidates with their accuracy on the whole split.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from experiment import RATES, load, make_parser
from numpy.typing import NDArray
from report import print_environment, print_table
from torch import Tensor

from cacp_ray.evaluation import racing
from cacp_ray.evaluation.racing import Bools, decode_hits, estimate, prefixes
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.training.metrics import predict

ROUND_SIZE = 6
HARDEST = "hardest first"
# Order of the images, parts and patience; the first row is the setting of a search.
RACES = [
    ("as it stands", racing.NUM_PARTS, racing.PATIENCE),
    *(("as it stands", 16, patience) for patience in (0.0, 0.5, 2.0)),
    *(("as it stands", parts, 1.0) for parts in (4, 8, 32)),
    *((HARDEST, 16, patience) for patience in (0.0, 0.5, 1.0, 2.0)),
]


def read(folder: Path) -> list[EpisodeRecord]:
    """The distinct candidates of a search whose hits are known, in order."""
    rows = {row.key: row for row in reversed(RunDirectory(folder).read_records()) if row.hits}
    return sorted(rows.values(), key=lambda row: row.index)


def race(
    rows: list[EpisodeRecord], hits: list[Bools]
) -> tuple[float, dict[float, float], list[tuple[float, float, float]]]:
    """Replays a recorded search with racing.

    Args:
        rows: Records of the candidates.
        hits: Which images each candidate got right, in the order of scoring.

    Returns:
        The share of images that were scored, points lost by rate, and (rate, estimate, accuracy)
        for each stopped candidate.
    """
    best: dict[float, int] = {}
    scored, known, stopped = [], [], []
    for start in range(0, len(rows), ROUND_SIZE):
        opponents = dict(best)
        for i in range(start, min(start + ROUND_SIZE, len(rows))):
            images = len(hits[i])
            opponent = opponents.get(rows[i].rate)
            if opponent is not None:
                images = stop_at(hits[i], hits[opponent])
            scored.append(images / len(hits[i]))
            if images < len(hits[i]):
                value = estimate(hits[i][:images], hits[opponents[rows[i].rate]])
                stopped.append((rows[i].rate, value, float(hits[i].mean())))
                continue
            known.append(i)
            if rows[i].rate not in best or hits[i].mean() > hits[best[rows[i].rate]].mean():
                best[rows[i].rate] = i
    lost = {}
    for rate in RATES:
        whole = max(hits[i].mean() for i, row in enumerate(rows) if row.cost_kept <= rate + 1e-9)
        raced = max(hits[i].mean() for i in known if rows[i].cost_kept <= rate + 1e-9)
        lost[rate] = 100 * float(whole - raced)
    return float(np.mean(scored)), lost, stopped


def stop_at(hits: Bools, best: Bools) -> int:
    """Number of images after which the candidate is given up, or all images."""
    for stop in prefixes(len(hits)):
        if racing.has_fallen_behind(hits[:stop], best[:stop]):
            return stop
    return len(hits)


def hardest_first(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """(N,) places of the images, by rising distance of the right class from the best other one.

    Args:
        logits: Logits of the whole network, (N, classes).
        labels: (N,).
    """
    right = labels[:, None]
    others = logits.scatter(1, right, float("-inf")).max(dim=1).values
    margins = (logits.gather(1, right)[:, 0] - others).abs()
    return margins.argsort(stable=True).numpy()


def main() -> None:
    parser = make_parser(__doc__ or "")
    parser.add_argument("runs", nargs="+", type=Path, help="folders with recorded episodes")
    options: argparse.Namespace = parser.parse_args()
    model, search = load(options)
    labels = torch.from_numpy(search.labels)
    logits = predict(model, search.tensors()[0], 500, torch.float32)
    orders = {
        "as it stands": np.arange(len(labels)),
        HARDEST: hardest_first(logits, labels),
    }
    searches = {run: read(run) for run in options.runs}
    if empty := [str(run) for run, rows in searches.items() if not rows]:
        parser.error(f"no episodes in {', '.join(empty)}")
    table, errors = [], []
    for name, racing.NUM_PARTS, racing.PATIENCE in RACES:
        race_of = [name, str(racing.NUM_PARTS), f"{racing.PATIENCE:g}"]
        replays = [
            race(rows, [decode_hits(row.hits)[orders[name]] for row in rows])
            for rows in searches.values()
        ]
        images = float(np.mean([share for share, _, _ in replays]))
        lost = np.array([list(by_rate.values()) for _, by_rate, _ in replays])
        table.append(
            [
                *race_of, f"{100 * images:.0f} %", f"{1 / images:.1f}x",
                f"{lost.mean():.2f}", f"{lost.max():.2f}",
                f"{(lost.mean(axis=1) <= 0.2).sum()} of {len(replays)}",
                f"{(lost.max(axis=1) <= 0.2).sum()} of {len(replays)}",
            ]
        )  # fmt: skip
        stopped = [candidate for _, _, candidates in replays for candidate in candidates]
        off = np.array([(rate, value - top1) for rate, value, top1 in stopped])
        columns = [100 * off[off[:, 0] == rate, 1] for rate in RATES]
        errors.append(
            [*race_of, *(f"{column.mean():+.2f} ({column.std():.2f})" for column in columns)]
        )
    num = sum(len(rows) for rows in searches.values())
    race_of = ["order of the images", "parts", "patience"]
    header = [
        *race_of, "images", "times fewer", "lost, mean", "lost, most",
        "searches that lose 0.2 or less (mean over rates)", "(at every rate)",
    ]  # fmt: skip
    print_table(f"{len(searches)} searches, {num:,} candidates", header, table)
    header = [*race_of, *(str(rate) for rate in RATES)]
    title = "Estimates of stopped candidates less their accuracy, points (standard deviation)"
    print_table(title, header, errors)
    print_environment(options.seed)


if __name__ == "__main__":
    main()
