"""Which networks the pruning engine covers, as a table: `python -m tests.coverage --out FILE`.

Every network is traced once and cut to random keep counts at three rates, and to one channel a
group. Each small network must run, give the right output shape, cost what was predicted (MACs by
PyTorch's own counter, with gradients and without, parameters by counting) and answer like the whole
network with zeros for the cut channels, except where something is normalised over the channels. The
smallest takes a step of training where the whole network does, and answers the same after the
network's own helper for deployment has fused its branches, where there is one. As a check that
knows nothing of operations, the MACs must explain the time that the whole network takes.
"""

import argparse
import copy
import math
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cacp_ray.config.run import PruningConfig
from cacp_ray.io.environment import describe_environment
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.flops import without_fast_paths
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.surgery import Cutter, all_tensors, reorder_weights
from cacp_ray.pruning.verify import _train_once, zero_channels
from cacp_ray.searching.strategies.random import RandomStrategy
from cacp_ray.workflows.setup import make_budget
from tests.coverage_networks import HELD_OUT, TIMM, torchvision_networks

RATES = (0.3, 0.5, 0.7)
SIDE = 128  # pixels
SECONDS = 600  # time limit for a network
MATRIX = 1024  # side of the matrices whose product tells the speed of this machine
# Bounds of MACs a second, as a share of that product's. Small and depthwise convolutions reach
# little of it; Winograd's convolutions save up to 2.25 of the multiplications that are counted.
SLOWEST, FASTEST = 1 / 200, 2.5
FULL_SIZE = ("bat_resnext26ts", "halonet26t")  # attention over blocks of 8 positions
FUSED_TOLERANCE = 1e-3  # difference of a fused network, likewise
TOLERANCE = 1e-4  # difference of masked and cut networks, relative to the largest output


@dataclass
class Row:
    """Result for one network.

    Attributes:
        name: Name for `cacp-ray inspect`.
        groups: Number of channel groups.
        prunable: Share of the MACs that is cut when every group keeps its fewest channels.
        rates: Reachable ones of RATES.
        error: Largest difference of masked and cut networks, relative to the largest output.
        is_exact: Whether nothing is normalised over pruned channels.
        checks: What else was checked: `trains`, `fuses`.
        speed: MACs a second of the whole network, as a share of a product of matrices.
        seconds: Duration of the analysis.
        problem: Reason of a failure, None if there is none.
    """

    name: str
    groups: int = 0
    prunable: float = 0.0
    rates: tuple[float, ...] = ()
    error: float = 0.0
    is_exact: bool = True
    checks: tuple[str, ...] = ()
    speed: float = 0.0
    seconds: float = 0.0
    problem: str | None = None


@torch.no_grad()
def check_network(name: str, make: Callable[[], tuple[nn.Module, Tensor]]) -> Row:
    """Traces, cuts and compares one network."""
    row = Row(name)
    model, x = make()
    model.eval()
    randomise(model)
    started = time.perf_counter()
    plan = make_plan(model, x)
    row.seconds = time.perf_counter() - started
    channels = plan.cost_model.num_channels
    row.groups = len(channels)
    row.is_exact = not plan.normalised
    whole = int(plan.macs(channels))
    row.speed = check_speed(model, x, whole)
    row.prunable = 1 - int(plan.macs(plan.least_counts)) / whole
    budget = make_budget(plan, "macs", PruningConfig(floor=1e-6))
    row.rates = tuple(r for r in RATES if budget.limit(r) >= budget.smallest)
    candidates = [plan.least_counts, channels]
    if row.rates:
        asked = RandomStrategy(budget, row.rates, seed=0).ask(len(row.rates))
        candidates += [np.array(proposal.keep_counts) for proposal in asked]
    expected = flat(model(x)).shape
    resizable, masked = ResizableNetwork(model), ResizableNetwork(model)
    for counts in candidates:
        small = cut(plan, model, resizable, counts)
        with FlopCounterMode(display=False) as counter:
            output = flat(small(x))
        if output.shape != expected:
            raise AssertionError(f"output {tuple(output.shape)} instead of {tuple(expected)}")
        if not torch.isfinite(output).all():
            raise AssertionError("NaN or infinity in the output")
        predicted = int(plan.macs(counts))
        for counted in (counter.get_total_flops() // 2, count_with_gradients(small, x)):
            if counted != predicted:
                raise AssertionError(f"{counted} MACs, predicted {predicted}")
        if (counted := sum(p.numel() for p in small.parameters())) != int(plan.params(counts)):
            raise AssertionError(f"{counted} parameters, predicted {int(plan.params(counts))}")
        if plan.normalised:
            continue
        error = compare(output, flat(mask(plan, model, masked, counts)(x)))
        if error > TOLERANCE:  # float64 shows whether an untrained network only amplified rounding
            wide, y = copy.deepcopy(model).double(), x.double()
            output = flat(cut(plan, wide, ResizableNetwork(wide), counts)(y))
            error = compare(output, flat(mask(plan, wide, ResizableNetwork(wide), counts)(y)))
        row.error = max(row.error, error)
    if row.error > TOLERANCE:
        raise AssertionError(f"masked and cut networks differ by {row.error:.1e}")
    small = copy.deepcopy(cut(plan, model, resizable, plan.least_counts))
    row.checks = (*check_training(model, small, x), *check_fusing(model, small, x))
    return row


def count_with_gradients(model: nn.Module, x: Tensor) -> int:
    """MACs of a pass whose inputs need gradients, for which PyTorch takes no fused kernels."""
    with torch.enable_grad(), without_fast_paths(), FlopCounterMode(display=False) as counter:
        model(x.clone().requires_grad_())
    return counter.get_total_flops() // 2


def check_speed(model: nn.Module, x: Tensor, macs: int) -> float:
    """MACs a second as a share of a product of matrices, timed in turn, each at its fastest."""
    matrix = torch.ones(MATRIX, MATRIX)
    seconds = {model: math.inf, torch.mm: math.inf}
    for _ in range(3):
        for function, inputs in ((model, (x,)), (torch.mm, (matrix, matrix))):
            started = time.perf_counter()
            function(*inputs)
            seconds[function] = min(seconds[function], time.perf_counter() - started)
    speed = macs / seconds[model] / (MATRIX**3 / seconds[torch.mm])
    if not SLOWEST <= speed <= FASTEST:
        raise AssertionError(f"{macs:,} MACs do not explain {1e3 * seconds[model]:.1f} ms")
    return speed


def check_training(model: nn.Module, small: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Takes a step of training with the small network, if the whole one can."""
    if _train_once(model, x) is not None:
        return ()
    if (problem := _train_once(small, x)) is not None:
        raise AssertionError(f"the small network does not train: {problem}")
    return ("trains",)


def check_fusing(model: nn.Module, small: nn.Module, x: Tensor) -> tuple[str, ...]:
    """Fuses the branches of both networks by the helpers that they bring along."""
    if not any(hasattr(module, "reparameterize") for module in model.modules()):
        return ()
    from timm.utils import reparameterize_model

    for net in (model, small):
        before = flat(net.eval()(x))
        after = flat(reparameterize_model(net).eval()(x))
        if (error := compare(after, before)) > FUSED_TOLERANCE:
            if net is model:
                return ()  # random weights are too rough for the helper itself
            raise AssertionError(f"the fused small network differs by {error:.1e}")
    return ("fuses",)


def compare(output: Tensor, reference: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((output - reference).abs().max() / reference.abs().max().clamp_min(1e-30))


def cut(plan: Plan, model: nn.Module, resizable: ResizableNetwork, counts: np.ndarray) -> nn.Module:
    """The small network that keeps the best channels of every group, in a random order."""
    tensors = reorder_weights(plan, all_tensors(model), orders_of(plan))
    return resizable.load(Cutter(plan)(tensors, counts.tolist()))


def orders_of(plan: Plan) -> list[np.ndarray]:
    """Random importance orders, the same at each call."""
    rng = np.random.default_rng(2)
    return [rng.permutation(group.num_channels) for group in plan.groups]


def mask(
    plan: Plan, model: nn.Module, resizable: ResizableNetwork, counts: np.ndarray
) -> nn.Module:
    """The whole network with zeros where `cut` removes something."""
    return resizable.load(zero_channels(plan, all_tensors(model), counts, orders_of(plan)))


def randomise(model: nn.Module) -> None:
    """Gives statistics, scales and gains the sizes of a trained network, so nothing vanishes."""
    torch.manual_seed(0)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        value.requires_grad_(False)
        if name.endswith("running_mean"):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
        elif isinstance(value, nn.Parameter) and value.ndim <= 1:
            value.uniform_(0.5, 1.5) if not name.endswith("bias") else value.normal_(std=0.1)


def flat(output: object) -> Tensor:
    """The outputs of a network side by side."""
    if isinstance(output, Tensor):
        return output.flatten(1)
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(value) for value in values if value is not None], 1)


def make_torchvision(name: str) -> tuple[nn.Module, Tensor]:
    """The network and a small image: the checks do not depend on its size."""
    return build_model(f"torchvision:{name}", 10), torch.randn(1, 3, SIDE, SIDE)


def make_timm(name: str) -> tuple[nn.Module, Tensor]:
    """The network and a small image, or one of the only size that the network takes."""
    model = build_model(f"timm:{name}", 10)
    config = model.pretrained_cfg
    is_fixed = config.get("fixed_input_size") or name in FULL_SIZE
    side = config["input_size"][-1] if is_fixed else SIDE
    return model, torch.randn(1, 3, side, side)


def run(names: Iterable[str], prefix: str, make: Callable) -> list[Row]:
    """One row for each network, failures included."""
    rows = []
    for name in names:
        signal.signal(signal.SIGALRM, _timeout)
        signal.alarm(SECONDS)
        try:
            row = check_network(f"{prefix}:{name}", lambda name=name: make(name))
        except Exception as error:
            if not isinstance(error, AssertionError):
                traceback.print_exc()
            row = Row(f"{prefix}:{name}", problem=" ".join(str(error).split())[:120])
        finally:
            signal.alarm(0)
        print(format_row(row), flush=True)
        rows.append(row)
    return rows


def _timeout(*_: object) -> None:
    raise TimeoutError(f"not done within {SECONDS} s")


MAKERS = {"torchvision": make_torchvision, "timm": make_timm}
HEADER = (
    "| network | groups | MACs prunable | rates run | masked = cut | also | speed | analysis (s) "
    "| |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def format_row(row: Row) -> str:
    """A line of the Markdown table."""
    if row.problem:
        return f"| {row.name} | | | | | | | | fails: {row.problem} |"
    rates = ", ".join(f"{rate:.1f}" for rate in row.rates) or "-"
    same = f"{row.error:.0e}" if row.is_exact else "normalised"
    return (
        f"| {row.name} | {row.groups} | {100 * row.prunable:.1f} % | {rates} | {same} | "
        f"{', '.join(row.checks) or '-'} | {row.speed:.2g} | {row.seconds:.2f} | |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="torchvision:NAME or timm:NAME; default: all")
    parser.add_argument("--without-held-out", action="store_true")
    parser.add_argument("--out", type=Path, help="Markdown file with the tables")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    if options.names:
        named = [name.partition(":") for name in options.names]
        for source, _, rest in named:
            if source not in MAKERS or not rest:
                parser.error(f"{source}: write torchvision:NAME or timm:NAME")
        print(HEADER)
        rows = [row for source, _, rest in named for row in run([rest], source, MAKERS[source])]
        write_tables(options.out, format_table("as named", rows))
        sys.exit(int(any(row.problem is not None for row in rows)))
    sections = [("torchvision", "torchvision", torchvision_networks(), make_torchvision)]
    sections += [("timm", "timm", TIMM, make_timm)]
    if not options.without_held_out:
        sections += [("timm, put aside while the tracer was built", "timm", HELD_OUT, make_timm)]
    lines = []
    for title, prefix, names, make in sections:
        lines += format_table(title, run(names, prefix, make))
    write_tables(options.out, lines)


def format_table(title: str, rows: list[Row]) -> list[str]:
    """Lines of one section of the Markdown file."""
    good = sum(row.problem is None for row in rows)
    head = [f"## {title}: {good} of {len(rows)} work", "", HEADER]
    return [*head, *map(format_row, rows), ""]


def write_tables(out: Path | None, lines: list[str]) -> None:
    """Writes the Markdown file if `out` is given."""
    if out:
        about = describe_environment(0)
        versions = ", ".join(f"{k} {v}" for k, v in about["packages"].items() if "torch" in k)
        head = (Path(__file__).parent / "coverage_head.md").read_text()
        stamp = f"Commit {about['commit']}, {versions}, timm {_timm_version()}.\n"
        out.write_text("\n".join([head, stamp, *lines]))


def _timm_version() -> str:
    from importlib.metadata import version

    return version("timm")


if __name__ == "__main__":
    main()
