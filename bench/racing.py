"""What racing saves and what it loses, from recorded searches.

OMP_NUM_THREADS=1 python bench/racing.py --search TRAIN --search-rows 45000:50000 RUN [RUN ...]

Every search recorded which images each candidate got right. Its candidates race again, in rounds as
they were proposed, each against the best that is known by then at its rate: in more or fewer parts,
with more or less patience, in the order of the split or the images first of which the whole network
is least sure.
`images` is the share that is scored; `lost` is what the best network of the whole search is better
than the best that the race scored to the end, in points on the whole split. The last table says how
far the estimates of the stopped candidates are from what the whole split says of them.
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
from cacp_ray.searching.records import EpisodeRecord
from cacp_ray.searching.run_directory import RunDirectory
from cacp_ray.training.metrics import predict

ROUND_SIZE = 6
HARDEST = "hardest first"
# Order of the images, parts, patience. The first is what a search does.
RACES = [
    ("as it stands", racing.NUM_PARTS, racing.PATIENCE),
    *(("as it stands", 16, patience) for patience in (0.0, 0.5, 2.0)),
    *(("as it stands", parts, 1.0) for parts in (4, 8, 32)),
    *((HARDEST, 16, patience) for patience in (0.0, 0.5, 1.0, 2.0)),
]


def read(folder: Path) -> list[EpisodeRecord]:
    """The distinct candidates of a search whose hits are known, in order."""
    rows = {row.subnet: row for row in reversed(RunDirectory(folder).read_records()) if row.hits}
    return sorted(rows.values(), key=lambda row: row.index)


def race(
    rows: list[EpisodeRecord], hits: list[Bools]
) -> tuple[float, dict[float, float], list[tuple[float, float, float]]]:
    """A recorded search with racing.

    Args:
        rows: Of the candidates.
        hits: Of the candidates, in the order in which images are scored.

    Returns:
        The share of images that were scored, points lost by rate, and of the stopped candidates
        rate, estimate and accuracy.
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
        of_all = max(hits[i].mean() for i, row in enumerate(rows) if row.cost_kept <= rate + 1e-9)
        found = max(hits[i].mean() for i in known if rows[i].cost_kept <= rate + 1e-9)
        lost[rate] = 100 * float(of_all - found)
    return float(np.mean(scored)), lost, stopped


def stop_at(hits: Bools, best: Bools) -> int:
    """Images after which the candidate is given up, or all."""
    for stop in prefixes(len(hits)):
        if racing.has_fallen_behind(hits[:stop], best[:stop]):
            return stop
    return len(hits)


def hardest_first(logits: Tensor, labels: Tensor) -> NDArray[np.int64]:
    """Places of the images (N,), rising by how far the right class is from the next or the best.

    Args:
        logits: Of the whole network, (N, classes).
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
        found = [
            race(rows, [decode_hits(row.hits)[orders[name]] for row in rows])
            for rows in searches.values()
        ]
        images = float(np.mean([share for share, _, _ in found]))
        lost = np.array([list(each.values()) for _, each, _ in found])
        table.append(
            [
                *race_of, f"{100 * images:.0f} %", f"{1 / images:.1f}x",
                f"{lost.mean():.2f}", f"{lost.max():.2f}",
                f"{(lost.mean(axis=1) <= 0.2).sum()} of {len(found)}",
                f"{(lost.max(axis=1) <= 0.2).sum()} of {len(found)}",
            ]
        )  # fmt: skip
        off = np.array([(rate, value - top1) for _, _, each in found for rate, value, top1 in each])
        cells = [100 * off[off[:, 0] == rate, 1] for rate in RATES]
        errors.append([*race_of, *(f"{each.mean():+.2f} ({each.std():.2f})" for each in cells)])
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
