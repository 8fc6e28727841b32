"""Predicted against measured latency of random subnets: python bench/latency.py [--network NAME].

A table of the network is measured as `cacp-ray latency measure` does; the judged subnets have no
part in it. Then subnets at random keep counts, on budgets of 0.2 to 0.9 of the MACs, are measured
in turn, and the table's prediction stands next to each measurement. Two other predictions serve as
comparison, each by a line fitted to the judged subnets themselves: *not monotone*, from the table
as it was measured, which no search could use (the difference is the price of monotony), and *MACs*.
*Measured twice* compares the odd rounds of the measurement with the even ones; no prediction can be
better. Passes are timed by the processor time of the one thread, so other processes do not lengthen
them. Each --network gives rows of its own. A second table at multiples of 8 channels, and subnets
of those widths, show how much of the error comes from widths that the kernels dislike.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from numpy.typing import NDArray
from report import print_environment, print_table

from cacp_ray.config.run import ModelConfig, PruningConfig
from cacp_ray.evaluation.latency import use_threads
from cacp_ray.evaluation.latency_table import RUNTIMES, LatencyTable, Settings
from cacp_ray.evaluation.layer_timing import fit_calibration, measure_table
from cacp_ray.exporting.timing import make_timer
from cacp_ray.models.factory import default_input_shape
from cacp_ray.pruning.latency_cost import Calibration, make_latency_cost
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors
from cacp_ray.searching.budget import spend
from cacp_ray.workflows.network import load_model
from cacp_ray.workflows.setup import make_budget, with_latency

NETWORKS = ("resnet20", "resnet56", "torchvision:resnet18@64")
RATES = (0.2, 0.9)
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def draw_subnets(plan: Plan, round_to: int, number: int, seed: int) -> Ints:
    """(number, G) random keep counts that spend random budgets of MACs."""
    rng = np.random.default_rng(seed)
    budget = make_budget(plan, "macs", PruningConfig(floor=0.1, round_to=round_to))
    least = 1.001 * budget.smallest / budget.total
    rates = rng.uniform(max(RATES[0], least), RATES[1], number)
    ratios = rng.lognormal(0, 0.4, (number, len(budget.num_channels)))
    desired = np.minimum(np.sqrt(rates)[:, None] * ratios, 1) * budget.num_channels
    return spend(budget, desired, rates)


def compare(predicted: Floats, measured: Floats) -> list[str]:
    """Median and largest relative error in %, and Spearman's rank correlation."""
    errors = 100 * np.abs(predicted - measured) / measured
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    rank = np.corrcoef(*ranks)[0, 1]
    return [f"{np.median(errors):.1f}", f"{errors.max():.1f}", f"{rank:.3f}"]


def sum_as_measured(plan: Plan, table: LatencyTable, counts: Ints) -> Ints:
    """(N,) nanoseconds of the layers by the table as it was measured, not monotone."""
    cost = make_latency_cost(
        plan.cost_model.layers,
        table.grids,
        Calibration(),
        surface=lambda times: np.rint(times).astype(np.int64),
    )
    return cost.sum_layers(counts)


def on_a_line(values: Ints, measured: Floats) -> Floats:
    """Predictions by the line from `values` that fits these networks best."""
    line = fit_calibration(np.asarray(values), measured)
    return line.constant + line.scale * values


def bench_network(
    spec: str, round_to: int, settings: Settings, options: argparse.Namespace
) -> list[str]:
    name, _, side = spec.partition("@")
    weights = "embedded:resnet20_cifar10" if name == "resnet20" else None
    model = load_model(ModelConfig(name=name, weights=weights), 10)
    shape = default_input_shape(name, model)
    shape = (shape[0], int(side), int(side)) if side else shape
    plan = make_plan(model, torch.zeros(1, *shape))
    started = time.perf_counter()
    timer = make_timer(settings)
    table = measure_table(name, model, plan, settings, round_to=round_to, timer=timer)
    seconds = time.perf_counter() - started
    plan = with_latency(plan, table)
    counts = draw_subnets(plan, round_to, options.subnets, options.seed)
    tensors, cut = all_tensors(model), Cutter(plan)
    x = torch.randn(settings.batch, *shape)
    nets = [(build_subnet(model, tensors | cut(tensors, row)), x) for row in counts.tolist()]
    with use_threads(settings.threads):
        passed = timer(nets, 2, options.repeats, 60.0)
    measured = np.array([1e6 * statistics.median(times) for times in passed])
    halves = [
        np.array([statistics.median(times[first::2]) for times in passed]) for first in (0, 1)
    ]
    assert plan.cost_model.latency is not None
    predicted = plan.cost_model.latency(counts).astype(np.float64)
    return [
        settings.runtime,
        f"{name.rpartition(':')[2]}, {'x'.join(map(str, shape[1:]))}",
        str(round_to),
        f"{len(table.cells):,} in {seconds:.0f} s",
        f"{measured.min() / 1e6:.2f}-{measured.max() / 1e6:.2f}",
        *compare(predicted, measured),
        *compare(on_a_line(sum_as_measured(plan, table, counts), measured), measured),
        *compare(on_a_line(plan.macs(counts), measured), measured),
        *compare(*halves),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=NETWORKS, help="NAME or NAME@SIDE")
    parser.add_argument("--round-to", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--subnets", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--runtime", nargs="+", choices=RUNTIMES, default=["torch"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [
        bench_network(spec, round_to, Settings(runtime=runtime), options)
        for spec in options.network
        for round_to in options.round_to
        for runtime in options.runtime
    ]
    header = ["runtime", "network", "widths in steps of", "table", "subnets, ms"]
    for what in ("table", "not monotone", "MACs", "measured twice"):
        header += [f"{what}: error, %", "largest, %", "rank"]
    print_table("Predicted latency of random subnets", header, rows)
    print_environment(options.seed)


if __name__ == "__main__":
    main()
