"""Subnets of photographs: python bench/imagenet.py RUN... --out FILE.

The runs are of `cacp-ray search` on one network and the same images. Each subnet is measured on the
test split, once. Beside them stand networks at the same rates that Torch-Pruning cuts by the norm
of weights and by Taylor terms: as that package leaves them, with BN statistics estimated anew, and
with its widths, but the order and the repair of the runs. Nothing is trained.

Rows that FILE holds already are not measured again.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import print_environment, print_table
from torch_pruning_arms import IMPORTANCES, prune

import cacp_ray
from cacp_ray.config.saved import read_run_config
from cacp_ray.evaluation.preparation import BN_BATCH
from cacp_ray.io.files import read_json, write_json
from cacp_ray.pruning.calibration import inputs_in_parts
from cacp_ray.pruning.recovery import recalibrate_bn
from cacp_ray.pruning.verify import count_macs
from cacp_ray.rundir.directory import read_result
from cacp_ray.training.metrics import measure_split
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits
from cacp_ray.workflows.winners import build_here

TAYLOR_IMAGES = 500


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSON file of all rows")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    setup = Setup.open(options.runs[0])
    bench = _Bench(setup, options.out)
    bench.add("base", 1.0, lambda: setup.model)
    for run in options.runs:
        name = read_run_config(run).strategy
        for row in read_result(run)["rates"]:
            path = run / row["path"]
            bench.add(name, row["rate"], lambda path=path: cacp_ray.load_subnet(path, trust=True))
    images, labels = Splits(setup.config.data).read("train").take(TAYLOR_IMAGES).tensors()
    for by in IMPORTANCES:
        for rate in setup.config.rates:
            own = f"torch-pruning {by}"
            if not bench.has(own, rate) or not bench.has(f"{own}, our repair", rate):
                net = prune(setup.model, images, labels, rate, by)
                counts = read_counts(setup, net)
                recalibrate_bn(net, inputs_in_parts(setup.calibration, BN_BATCH))
                bench.add(own, rate, lambda net=net: net)
                (built,) = build_here(setup)([(counts, "")])
                bench.add(f"{own}, our repair", rate, lambda built=built: built.net)
    bench.print()
    print_environment(setup.config.seed)


def read_counts(setup: Setup, net: torch.nn.Module) -> tuple[int, ...]:
    """Channels that a network cut by another package keeps in each of our groups."""
    tensors = net.state_dict()
    counts: list[int] = []
    for group in setup.plan.groups:
        name, _, dim = group.members[0].rpartition(":")
        counts.append(tensors[name].shape[int(dim)])
    return tuple(counts)


class _Bench:
    """Rows of the table, each written as soon as it is measured."""

    def __init__(self, setup: Setup, file: Path) -> None:
        self._setup, self._file = setup, file
        self._rows: list[dict[str, Any]] = read_json(file) if file.exists() else []
        self._test = Splits(setup.config.data).read("test")
        self._total = count_macs(setup.model, self._test.at(np.arange(1)).tensors()[0])

    def has(self, method: str, rate: float) -> bool:
        return any((row["method"], row["rate"]) == (method, rate) for row in self._rows)

    def add(self, method: str, rate: float, make: Any) -> None:
        """Measures a network on both splits, unless it is known."""
        if self.has(method, rate):
            return
        started = time.perf_counter()
        net = make()
        search, test = (measure_split(net, split) for split in (self._setup.search, self._test))
        row = {
            "method": method,
            "rate": rate,
            "macs_kept": count_macs(net, self._test.at(np.arange(1)).tensors()[0]) / self._total,
            "search": search.top1,
            "test": test.top1,
            "test_top5": test.top5,
            "search_images": search.images,
            "test_images": test.images,
            "seconds": time.perf_counter() - started,
        }
        self._rows.append(row)
        write_json(self._file, self._rows)

    def print(self) -> None:
        rows = [
            [
                f"{row['rate']:.2f}",
                row["method"],
                f"{100 * row['macs_kept']:.1f}",
                f"{100 * row['search']:.1f}",
                f"{100 * row['test']:.1f}",
                f"{100 * row['test_top5']:.1f}",
            ]
            for row in sorted(self._rows, key=lambda row: -row["rate"])
        ]
        first = self._rows[0]
        title = (
            f"{self._setup.config.model.name}, top-1 in %, {first['search_images']} search and "
            f"{first['test_images']} test photographs"
        )
        header = ["kept", "method", "% MACs", "search", "test", "test, top-5"]
        print_table(title, header, rows)
        error = 100 * (first["test"] * (1 - first["test"]) / first["test_images"]) ** 0.5
        print(f"\nStandard error of one test accuracy near the base: {error:.1f} points.")


if __name__ == "__main__":
    main()
