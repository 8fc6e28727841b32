"""How well critics rank networks that are measured later, by their inputs and targets.

OMP_NUM_THREADS=1 python bench/critics.py RUN [RUN ...]

Critics of the agent's widths learn from the first episodes of a recorded search of three rates, for
as many steps as the agent would have taken. They then rank the next 75 episodes. The table shows
Spearman's rank correlation with the accuracies of the same rate, as the mean over rates, runs and
cuts. For comparison, the last row is a Gaussian process (Matern 5/2, one length a group, fitted by
marginal likelihood).
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from report import print_environment, print_table
from scipy.stats import spearmanr
from torch import nn

from cacp_ray.agent.cacp.critics import INPUT_CENTRE, INPUT_SCALE, NUM_CRITICS
from cacp_ray.agent.cacp.replay import Replay
from cacp_ray.agent.parts import make_layers
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.rundir.records import EpisodeRecord
from cacp_ray.searching.settings import AgentSettings

Array = NDArray[np.float64]
CUTS = (60, 120, 200)
NEXT = 75
MIN_SPREAD = 0.03  # of values at one rate
SETTINGS = AgentSettings()


def learn(x: Array, targets: Array, steps: int) -> Callable[[Array], Array]:
    """Critics on rows (N, F) and targets (N,), as the agent's learner trains its own."""
    torch.manual_seed(0)
    critics = [
        nn.Sequential(*make_layers((x.shape[1], *SETTINGS.hidden, 1), nn.SiLU))
        for _ in range(NUM_CRITICS)
    ]
    optimizer = torch.optim.Adam([p for c in critics for p in c.parameters()], lr=SETTINGS.lr)
    rows, wanted = torch.tensor(x).float(), torch.tensor(targets).float()
    for _ in range(steps):
        loss = torch.zeros(())
        for critic in critics:
            drawn = torch.randint(len(rows), (SETTINGS.batch_size,))
            loss = loss + ((critic(rows[drawn])[:, 0] - wanted[drawn]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def predict(x: Array) -> Array:
        return torch.stack([c(torch.tensor(x).float()) for c in critics]).mean(0)[:, 0].numpy()

    return predict


def learn_process(x: Array, targets: Array, steps: int) -> Callable[[Array], Array]:
    """A Gaussian process instead of the critics."""
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel

    lengths = Matern(np.full(x.shape[1], 3.0), (0.1, 100.0), nu=2.5)
    kernel = ConstantKernel(1.0, (0.01, 1000.0)) * lengths + WhiteKernel(0.01, (1e-4, 1.0))
    process = GaussianProcessRegressor(kernel, normalize_y=True, random_state=0)
    return process.fit(x, targets).predict


def read(folder: Path, num_channels: Array) -> tuple[list[EpisodeRecord], Replay, Array, Array]:
    """Episodes of a run, the agent's memory of them, rates, and offsets from a rate's first."""
    rows = [row for row in RunDirectory(folder).read_records() if row.status == "ok"]
    counts = np.array([row.keep_counts for row in rows])
    rates = np.array([row.rate for row in rows])
    log_ratios = np.log(counts / num_channels)
    first = np.array([np.flatnonzero(rates == rate)[0] for rate in rates])
    offsets = (log_ratios - log_ratios[first]) / SETTINGS.action_scale
    replay = Replay(counts.shape[1])
    replay.add(
        log_ratios=log_ratios,
        score=[row.score for row in rows],
        loss=[row.loss for row in rows],
        images=[row.images for row in rows],
    )
    return rows, replay, rates, offsets


def first_of(replay: Replay, count: int, *, loss: bool = True) -> Replay:
    """The first episodes; without `loss`, their values are accuracies."""
    part = Replay(replay.log_ratios.shape[1])
    columns = {name: rows for name, rows in vars(replay).items() if name != "num_added"}
    part.add(**{name: rows[:count] for name, rows in columns.items()})
    if not loss:
        part.loss = np.full_like(part.loss, np.nan)
    return part


def a_rate(replay: Replay, rates: Array) -> Array:
    """(N,) values, normalised by the values of the same rate."""
    values = replay.values()
    for rate in np.unique(rates):
        own = values[rates == rate]
        values[rates == rate] = (own - own.mean()) / max(own.std(), MIN_SPREAD)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--model", default="resnet20")
    options = parser.parse_args()
    torch.set_num_threads(1)
    plan = make_plan(build_model(options.model, 10).eval(), torch.zeros(1, 3, 32, 32))
    num_channels = plan.cost_model.num_channels
    correlations: dict[str, list[float]] = {}
    for folder in options.runs:
        rows, replay, rate, offsets = read(folder, num_channels)
        top1 = np.array([row.score for row in rows])
        of_rate = np.column_stack([rate, offsets])
        ratios = INPUT_SCALE * (replay.log_ratios.astype(float) - INPUT_CENTRE)
        for cut in CUTS:
            past, future = slice(0, cut), slice(cut, cut + NEXT)
            known, accuracies = first_of(replay, cut), first_of(replay, cut, loss=False)
            steps = SETTINGS.updates_per_episode * cut
            ways = {
                "rate and offsets -> accuracy, normalised a rate": (
                    learn, of_rate, a_rate(accuracies, rate[past])),
                "rate and offsets -> accuracy and loss, normalised a rate": (
                    learn, of_rate, a_rate(known, rate[past])),
                "keep ratios -> accuracy": (learn, ratios, accuracies.values()),
                "keep ratios -> accuracy and loss (ours)": (learn, ratios, known.values()),
                "the same, a Gaussian process": (learn_process, ratios, known.values()),
            }  # fmt: skip
            for name, (method, x, targets) in ways.items():
                predicted = method(x[past], targets, steps)(x[future])
                by_rate = [
                    spearmanr(predicted[mask], top1[future][mask])[0]
                    for one in np.unique(rate[future])
                    if (mask := rate[future] == one).sum() > 2
                ]
                correlations.setdefault(name, []).append(float(np.mean(by_rate)))
    table = [
        [name, f"{np.mean(values):.2f}", " ".join(f"{value:.2f}" for value in values)]
        for name, values in correlations.items()
    ]
    title = f"rank correlation, {len(options.runs)} runs, after {CUTS} episodes"
    print_table(title, ["critic", "mean", "each"], table)
    print_environment(0)


if __name__ == "__main__":
    main()
