"""Searches of networks and scores other than image classification: before and after training.

OMP_NUM_THREADS=1 python bench/own_tasks.py --train TRAIN.parquet --test TEST.parquet --out OUT \
    [--tasks super-resolution digits siamese] [--seeds 0 1 2] [--evaluations 120]

super-resolution: twice the sides of gray CIFAR-10 images, a pixel-shuffle network, PSNR in dB.
digits: scikit-learn's handwritten digits as sequences of 64 values, a 1-d network, accuracy.
siamese: whether two crops come from one CIFAR-10 image, a network of two inputs, accuracy.

This script trains every network. A seed is one search by each strategy, at equal evaluations
(uniform has nothing to search), and one training of every subnet by the task's own loop. The same
loop trains the whole network on. Validation data judges the searches; the table is of test data,
which chose nothing. Cells are means over seeds and half the width of a 95 % t interval over seeds.
The same command goes on after a kill.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from report import print_environment, print_table
from scipy.stats import t
from torch import Tensor, nn
from torch.nn import functional

import cacp_ray
from cacp_ray.data.images import read_parquet

RATES = (0.3, 0.5, 0.7)
STRATEGIES = ("uniform", "random", "cacp")
QUIET = {"frontier": False, "learning": False, "latency": False}
Batch = tuple[Tensor, ...]


@dataclass(frozen=True)
class Data:
    """Inputs and wanted outputs of three disjoint parts; the network takes all but the last."""

    train: Batch
    search: Batch
    test: Batch


@dataclass(frozen=True)
class Problem:
    """A network, its data, its loss and its score; higher is better."""

    make: Callable[[], nn.Module]
    data: Data
    loss: Callable[[Any, Tensor], Tensor]
    score: Callable[[Any, Tensor], Tensor]
    metric: str
    epochs: int  # of the whole network; subnets are trained for a third of them
    rate: float = 2e-3

    def batches(self, size: int = 64) -> Iterator[Batch]:
        """Training data in random order."""
        order = torch.randperm(len(self.data.train[0]))
        for part in order.split(size):
            yield tuple(column[part] for column in self.data.train)

    def measure(self, net: nn.Module, name: str) -> float:
        """Score of a network on a part of the data."""
        with torch.no_grad():
            *inputs, wanted = getattr(self.data, name)
            return float(self.score(net.eval()(*inputs), wanted))

    def train(self, net: nn.Module, epochs: int, context: Any = None) -> None:
        """Trains with Adam and a cosine; reports every epoch where there is a context."""
        optimizer = torch.optim.Adam(net.parameters(), self.rate)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
        begin = 0
        if context is not None and context.state is not None:
            begin = context.epoch
            optimizer.load_state_dict(context.state["optimizer"])
            scheduler.load_state_dict(context.state["scheduler"])
        for epoch in range(begin, epochs):
            torch.manual_seed(epoch)
            net.train()
            for *inputs, wanted in self.batches():
                optimizer.zero_grad()
                self.loss(net(*inputs), wanted).backward()
                optimizer.step()
            scheduler.step()
            if context is not None:
                state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
                context.report(net, state)


class Upscaler(nn.Module):
    """A residual on top of the enlarged image, in the manner of ESPCN (Shi et al., 2016)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 5, padding=2), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, 4, 3, padding=1), nn.PixelShuffle(2),
        )  # fmt: skip

    def forward(self, small: Tensor) -> Tensor:
        """(N, 1, H, W) to (N, 1, 2 H, 2 W)."""
        large = functional.interpolate(small, scale_factor=2, mode="bilinear")
        return large + self.body(small)


class Sequence(nn.Module):
    """A residual network over one dimension."""

    def __init__(self, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, padding=2)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm1d(width), nn.ReLU(), nn.Conv1d(width, 2 * width, 5, padding=2),
                nn.BatchNorm1d(2 * width), nn.ReLU(), nn.Conv1d(2 * width, width, 5, padding=2),
            )
            for _ in range(4)
        )  # fmt: skip
        self.head = nn.Linear(8 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 1, 64) to (N, classes)."""
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(functional.adaptive_avg_pool1d(x.relu(), 8).flatten(1))


class Siamese(nn.Module):
    """One trunk for both inputs, and a head over their product and difference."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1, stride=2), nn.BatchNorm2d(2 * width),
            nn.ReLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.BatchNorm2d(2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Sequential(nn.Linear(16 * width, 32), nn.ReLU(), nn.Linear(32, 2))

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        """Two images to the scores of different and same (N, 2)."""
        a, b = self.trunk(first), self.trunk(second)
        return self.head(torch.cat([a * b, (a - b).abs()], 1))


def read_images(file: Path, rows: tuple[int, int]) -> Tensor:
    """Images (N, 3, 32, 32) in [0, 1]."""
    images = torch.from_numpy(read_parquet(str(file), rows).images)
    return images.permute(0, 3, 1, 2).float() / 255


def accuracy(scores: Tensor, wanted: Tensor) -> Tensor:
    return (scores.argmax(1) == wanted).float().mean()


def make_upscaling(options: Any) -> Problem:
    def pairs(file: Path, rows: tuple[int, int]) -> Batch:
        large = read_images(file, rows).mean(1, keepdim=True)
        return functional.avg_pool2d(large, 2), large

    data = Data(
        pairs(options.train, (0, 4000)),
        pairs(options.train, (45000, 45500)),
        pairs(options.test, (0, 2000)),
    )

    def psnr(image: Tensor, wanted: Tensor) -> Tensor:
        return -10 * (image - wanted).square().mean((1, 2, 3)).log10().mean()

    return Problem(Upscaler, data, functional.mse_loss, psnr, "PSNR (dB)", 15)


def make_digits(options: Any) -> Problem:
    from sklearn.datasets import load_digits

    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    x = torch.from_numpy(digits.data[order]).float()[:, None] / 8 - 1
    y = torch.from_numpy(digits.target[order])
    parts = [(x[a:b], y[a:b]) for a, b in ((0, 1000), (1000, 1300), (1300, len(y)))]
    return Problem(Sequence, Data(*parts), functional.cross_entropy, accuracy, "accuracy", 45)


def make_siamese(options: Any) -> Problem:
    def crops(file: Path, rows: tuple[int, int], seed: int) -> Batch:
        images = read_images(file, rows)
        rng = np.random.default_rng(seed)
        is_same = torch.from_numpy(rng.integers(0, 2, len(images)))
        others = torch.from_numpy(rng.permutation(len(images)))
        second = torch.where(is_same.bool(), torch.arange(len(images)), others)

        def crop(chosen: Tensor) -> Tensor:
            corners = rng.integers(0, 13, (len(chosen), 2))
            return torch.stack(
                [x[:, r : r + 20, c : c + 20] for x, (r, c) in zip(chosen, corners, strict=True)]
            )

        return crop(images) * 4 - 2, crop(images[second]) * 4 - 2, is_same

    data = Data(
        crops(options.train, (0, 8000), 0),
        crops(options.train, (45000, 46000), 1),
        crops(options.test, (0, 3000), 2),
    )
    return Problem(Siamese, data, functional.cross_entropy, accuracy, "accuracy", 12)


PROBLEMS = {
    "super-resolution": make_upscaling, "digits": make_digits, "siamese": make_siamese,
}  # fmt: skip


def train_base(problem: Problem, folder: Path) -> nn.Module:
    """The whole network, trained once."""
    file = folder / "base.pt"
    torch.manual_seed(0)
    net = problem.make()
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        problem.train(net, problem.epochs)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(net.state_dict(), file)
    return net.eval()


def run_one(
    problem: Problem, net: nn.Module, folder: Path, strategy: str, seed: int, evaluations: int
) -> dict[str, Any]:
    """One search, and the training of what it found; test scores by rate."""
    count = min(256, len(problem.data.train[0]))
    run = cacp_ray.search(
        {"strategy": strategy, "seed": seed, "report": QUIET},
        folder,
        model=net,
        example_inputs=tuple(column[:1] for column in problem.data.train[:-1]),
        calibration=lambda: problem.batches(count),
        score=lambda small: problem.measure(small, "search"),
        metric=problem.metric,
        rates=RATES,
        evaluations=9 if strategy == "uniform" else evaluations,
        resume=(folder / "config.yaml").exists(),
    )
    epochs = problem.epochs // 3
    if any(row.get("finetuned_score") is None for row in run.result["rates"]):
        resume = (folder / "finetune").exists()
        run.finetune(lambda small, context: problem.train(small, epochs, context), resume=resume)
    rows = []
    for rate, path in run.subnets.items():
        before = cacp_ray.load_subnet(path, model=net, finetuned=False)
        after = cacp_ray.load_subnet(path, model=net)
        scores = {
            "before": problem.measure(before, "test"),
            "after": problem.measure(after, "test"),
        }
        rows.append({"rate": rate, "kept": run.result["rates"][len(rows)]["cost_kept"], **scores})
    return {"strategy": strategy, "seed": seed, "evaluations": evaluations, "rows": rows}


def cell(values: list[float], scale: float) -> str:
    """Mean, and half of a 95 % t interval over seeds."""
    mean = scale * float(np.mean(values))
    if len(values) < 2:
        return f"{mean:.2f}"
    half = t.ppf(0.975, len(values) - 1) * scale * np.std(values, ddof=1) / len(values) ** 0.5
    return f"{mean:.2f} ± {half:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train", type=Path, required=True, help="CIFAR-10, Parquet")
    parser.add_argument("--test", type=Path, required=True, help="CIFAR-10, Parquet")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=list(PROBLEMS), default=list(PROBLEMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--evaluations", type=int, default=120)
    options = parser.parse_args()
    for name in options.tasks:
        problem, folder = PROBLEMS[name](options), options.out / name
        net = train_base(problem, folder)
        results = []
        for seed in options.seeds:
            for strategy in STRATEGIES:
                file = folder / f"{strategy}-{seed}.json"
                if not file.exists():
                    where = folder / "runs" / f"{strategy}-{seed}"
                    found = run_one(problem, net, where, strategy, seed, options.evaluations)
                    file.write_text(json.dumps(found, indent=1))
                results.append(json.loads(file.read_text()))
        trained_on = train_on(problem, net)
        scale = 100.0 if problem.metric == "accuracy" else 1.0
        base = scale * problem.measure(net, "test")
        table = [
            [f"{strategy}, {when}", *(
                cell([row[when] for r in results if r["strategy"] == strategy
                      for row in r["rows"] if row["rate"] == rate], scale)
                for rate in RATES
            )]
            for when in ("before", "after")
            for strategy in STRATEGIES
        ]  # fmt: skip
        unit = "%" if scale > 1 else ""
        title = (
            f"{name}: {problem.metric} {unit} on test data, whole network {base:.2f}, trained on "
            f"{scale * trained_on:.2f}; {len(options.seeds)} seeds"
        )
        print_table(title, ["strategy", *map(str, RATES)], table)
    print_environment(options.seeds[0])


def train_on(problem: Problem, net: nn.Module) -> float:
    """Test score of the whole network, trained on like a subnet; the best epoch by validation."""
    whole = problem.make()
    whole.load_state_dict(net.state_dict())

    class Keep:
        state, epoch = None, 0
        best = (problem.measure(net, "search"), problem.measure(net, "test"))

        def report(self, trained: nn.Module, state: Any) -> None:
            found = problem.measure(trained, "search"), problem.measure(trained, "test")
            self.best = max(self.best, found, key=lambda pair: pair[0])

    keep = Keep()
    problem.train(whole, problem.epochs // 3, keep)
    return keep.best[1]


if __name__ == "__main__":
    main()
