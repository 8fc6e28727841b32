"""Building a pruned network, against Torch-Pruning: python bench/cutting.py [--draws 7].

All ways start from the same random keep counts and the same channels to drop. They run in one
process, in turn, and are timed by processor time on one thread:
- views: what scoring does, `ResizableNetwork.load(Cutter(...))` after one plan and one reordering;
- copy: `build_subnet`, an independent network;
- Torch-Pruning, as its README says for given channels of given groups: copy the network, build the
  dependency graph of the copy, prune group by group. It cuts in place, and its graph belongs to one
  copy and cannot be copied with it, so each candidate pays for all three.
The script stops unless all networks answer alike and cost the same MACs.
"""

import argparse
import copy
import gc
import statistics
import time
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from report import print_environment, print_table
from torch import Tensor, nn

from cacp_ray.models.factory import build_model
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import ResizableNetwork, build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors, reorder_weights
from cacp_ray.pruning.verify import count_macs

# Side of the traced image, which the groups do not depend on.
NETWORKS = {"resnet56": 32, "torchvision:resnet50": 64, "torchvision:densenet121": 64}
WAYS = ("deepcopy alone", "Torch-Pruning", "views", "copy")
SMALLEST = 0.25  # least share of a group's channels that is kept
BATCH = 4  # candidates that one way builds before the next way's turn
CANDIDATES = 10_000


def prune_a_copy(
    model: nn.Module,
    plan: Plan,
    orders: Sequence[NDArray[np.int64]],
    counts: Sequence[int],
    x: Tensor,
) -> nn.Module:
    """Torch-Pruning's way: each group loses the channels that its order names last."""
    import torch_pruning as tp

    small = copy.deepcopy(model)
    graph = tp.DependencyGraph().build_dependency(small, example_inputs=x, verbose=False)
    for group, order, count in zip(plan.groups, orders, counts, strict=True):
        root = small.get_submodule(group.name)
        prune = graph.get_pruner_of_module(root).prune_out_channels
        if count < len(order):
            graph.get_pruning_group(root, prune, order[count:].tolist()).prune()
    return small


def time_in_turn(
    ways: dict[str, Callable[[list[int]], nn.Module]], batch: list[list[int]]
) -> dict[str, float]:
    """Processor seconds a candidate; each way warms up, then builds a batch, as a search does."""
    seconds = {}
    for name, build in ways.items():
        gc.collect()  # frees what the previous way left
        build(batch[0])
        started = time.process_time()
        for counts in batch:
            build(counts)
        seconds[name] = (time.process_time() - started) / len(batch)
    return seconds


def compare(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    """Stops unless both networks answer alike and cost the same."""
    with torch.no_grad():
        difference = (ours(x) - theirs(x)).abs().max() / theirs(x).abs().max()
    assert difference < 1e-4, f"logits differ by {difference:.1e}"
    assert count_macs(ours, x) == count_macs(theirs, x)


def bench_network(name: str, draws: int, seed: int) -> list[str]:
    """One row of the table."""
    torch.manual_seed(seed)
    model = build_model(name, 10).eval()
    x = torch.randn(1, 3, NETWORKS[name], NETWORKS[name])
    plan = make_plan(model, x)
    rng = np.random.default_rng(seed)
    whole = plan.cost_model.num_channels
    orders = [rng.permutation(n) for n in whole]
    tensors = all_tensors(model)
    ordered = reorder_weights(plan, tensors, orders)
    cutter, resizable = Cutter(plan), ResizableNetwork(model)
    resizable.load(ordered)
    times = []
    for draw in range(draws + 1):
        batch = [
            [int(rng.integers(np.ceil(SMALLEST * n), n + 1)) for n in whole] for _ in range(BATCH)
        ]
        ways: dict[str, Callable[[list[int]], nn.Module]] = {
            "deepcopy alone": lambda counts: copy.deepcopy(model),
            "Torch-Pruning": lambda counts: prune_a_copy(model, plan, orders, counts, x),
            "views": lambda counts: resizable.load(cutter(ordered, counts)),
            "copy": lambda counts: build_subnet(model, ordered | cutter(ordered, counts)),
        }
        seconds = time_in_turn(ways, batch)
        if draw > 0:  # the first calls import and allocate
            times.append(seconds)
    compare(ways["views"](batch[0]), ways["Torch-Pruning"](batch[0]), x)
    compare(ways["copy"](batch[0]), ways["Torch-Pruning"](batch[0]), x)
    median = {way: 1e3 * statistics.median(row[way] for row in times) for way in WAYS}
    gain = [
        statistics.median(row["Torch-Pruning"] / row[way] for row in times)
        for way in ("views", "copy")
    ]
    return [
        name.rpartition(":")[2],
        *(f"{median[way]:.1f}" for way in WAYS),
        *(f"{ratio:.0f}x" for ratio in gain),
    ]


def bench_cost(seed: int) -> None:
    """Milliseconds of the exact cost of many candidates."""
    model = build_model("torchvision:resnet50", 1000)
    plan = make_plan(model, torch.zeros(1, 3, 64, 64))
    whole = plan.cost_model.num_channels
    counts = np.random.default_rng(seed).integers(1, whole + 1, size=(CANDIDATES, len(whole)))
    seconds = []
    for _ in range(11):
        started = time.process_time()
        plan.macs(counts)
        seconds.append(time.process_time() - started)
    print(
        f"\nMACs of {CANDIDATES:,} candidates of ResNet-50 ({len(whole)} groups): "
        f"{1e3 * statistics.median(seconds):.0f} ms (median of {len(seconds)})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=7, help="batches of random keep counts")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="torch_pruning")
    rows = [bench_network(name, options.draws, options.seed) for name in NETWORKS]
    header = ["network", *(f"{way}, ms" for way in WAYS), "views gain", "copy gain"]
    print_table("Building one candidate", header, rows)
    bench_cost(options.seed)
    print_environment(options.seed)


if __name__ == "__main__":
    main()
