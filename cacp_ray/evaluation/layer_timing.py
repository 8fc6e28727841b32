"""Times the layers of a network over a grid of widths, and some whole networks.

A layer is a convolution or linear layer with the batch norm after it; a pass is timed as in
`cacp_ray.evaluation.latency`. A round runs all widths of a layer once, and layers and whole
networks are visited in several sweeps, so that drift of the machine affects all alike. The whole
networks, cut at random, show what a network adds to the sum of its layers.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cacp_ray.evaluation.latency import Timer, torch_timer, use_threads
from cacp_ray.evaluation.latency_table import (
    Cell,
    LatencyTable,
    Settings,
    make_grids,
    name_processor,
)
from cacp_ray.pruning.latency_cost import Calibration, Layer, LayerShape, make_latency_cost
from cacp_ray.pruning.plan import Plan
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors

SWEEPS = 3
NETWORKS = 24  # the calibration is fitted to these
SEED = 0

Widths = tuple[tuple[int, ...], tuple[int, ...]]  # C_in, C_out
Ints = NDArray[np.int64]


def measure_table(
    name: str,
    model: nn.Module,
    plan: Plan,
    settings: Settings,
    *,
    points: int = 17,
    round_to: int = 1,
    repeats: int = 30,
    seconds: float = 120.0,
    networks: int = NETWORKS,
    timer: Timer | None = None,
    on_progress: Callable[[str, int, int], object] = lambda what, done, total: None,
) -> LatencyTable:
    """Times every layer of a network at a grid of widths.

    A side of a layer that is cut gets up to `points` widths, multiples of `round_to`, which is that
    of the search (`pruning.round_to`). Each width and network is timed up to `repeats` times while
    `seconds` last; six passes of each layer always run. `timer` times in another runtime than
    PyTorch; it is the one of the settings. `on_progress` is told what was visited, the
    finished visits, and all visits.
    """
    device, timer = settings.device, timer or torch_timer(settings.clock)
    grid = choose_widths(plan.cost_model.layers, plan.cost_model.num_channels, points, round_to)
    counts = draw_counts(plan, networks, round_to, np.random.default_rng(SEED))
    tensors, cut = all_tensors(model), Cutter(plan)
    images = torch.randn(settings.batch, *plan.input_shape, device=device)
    nets = [
        (build_subnet(model, tensors | cut(tensors, row)).to(device), images)
        for row in counts.tolist()
    ]
    rounds, total = -(-repeats // SWEEPS), SWEEPS * (len(grid) + 1)
    half = seconds / (2 * SWEEPS)  # of a sweep: for its layers, and for whole networks
    passes: dict[tuple[LayerShape, int, int], list[float]] = {}
    whole: list[list[float]] = [[] for _ in nets]
    done = 0
    with use_threads(settings.threads), torch.random.fork_rng([]):  # pyright: ignore[reportUnknownMemberType]
        for _ in range(SWEEPS):
            for shape, widths in grid.items():
                pairs = [(inputs, outputs) for inputs in widths[0] for outputs in widths[1]]
                layers = [make_layer(shape, *pair, settings) for pair in pairs]
                times = timer(layers, 2, rounds, half / len(grid))
                for pair, milliseconds in zip(pairs, times, strict=True):
                    passes.setdefault((shape, *pair), []).extend(milliseconds)
                done += 1
                on_progress(str(shape), done, total)
            for index, passed in enumerate(timer(nets, 1, rounds, half)):
                whole[index] += passed
            done += 1
            on_progress("whole networks", done, total)
    cells = tuple(_summarise(*key, milliseconds) for key, milliseconds in passes.items())
    summed = make_latency_cost(plan.cost_model.layers, make_grids(cells), Calibration())
    measured = np.array([1e6 * statistics.median(passed) for passed in whole])
    calibration = fit_calibration(summed.sum_layers(counts), measured, summed.sum_macs(counts))
    predicted = replace(summed, calibration=calibration)(counts)
    return LatencyTable(
        network=name,
        input_shape=plan.input_shape,
        settings=settings,
        round_to=round_to,
        processor=name_processor(device),
        torch=torch.__version__,
        calibration=calibration,
        error=float(np.median(np.abs(predicted - measured) / measured)),
        networks=networks,
        cells=cells,
    )


def choose_widths(
    layers: Iterable[Layer], num_channels: Ints, points: int, round_to: int = 1
) -> dict[LayerShape, Widths]:
    """The grid of every layer shape: even steps up to the widest layer, and uncut widths.

    A side that is cut has up to `points` widths, multiples of `round_to`, and as many again for
    layers of the same shape that are at most half as wide.
    """
    sides: dict[LayerShape, tuple[list[tuple[int, bool]], list[tuple[int, bool]]]] = {}
    for layer in layers:
        both = sides.setdefault(layer.shape, ([], []))
        pairs = ((layer.inputs, layer.input_bias), (layer.outputs, layer.output_bias))
        for side, (slope, bias) in zip(both, pairs, strict=True):
            side.append((round(float(num_channels @ slope + bias)), bool(slope.any())))
    grid: dict[LayerShape, Widths] = {}
    for shape, (inputs, outputs) in sides.items():
        step = math.lcm(shape.groups or 1, shape.part[1], round_to)
        grid[shape] = _spread(inputs, points, round_to), _spread(outputs, points, step)
    return grid


def _spread(widths: list[tuple[int, bool]], points: int, step: int) -> tuple[int, ...]:
    """Widths of one side to measure, from each layer's width and whether it is cut."""
    nodes = {width for width, _ in widths}
    previous = float("inf")
    for width in sorted({width for width, is_cut in widths if is_cut}, reverse=True):
        if 2 * width <= previous:  # the steps of wider layers are too large
            levels = np.linspace(1, max(1, width // step), points)
            nodes |= {min(step * round(level), width) for level in levels.tolist()}
            previous = width
    return tuple(sorted(nodes))


def draw_counts(plan: Plan, number: int, round_to: int, rng: np.random.Generator) -> Ints:
    """Keep counts (number, G) of networks of all sizes, the whole network first."""
    whole = plan.cost_model.num_channels
    levels = rng.uniform(0.15, 1, (number, 1)) * rng.lognormal(0, 0.3, (number, len(whole)))
    counts = round_to * np.rint(levels * whole / round_to).astype(np.int64)
    counts = np.clip(counts, np.minimum(np.maximum(plan.least_counts, round_to), whole), whole)
    counts[0] = whole
    return counts


def fit_calibration(
    layers: Ints, measured: NDArray[np.float64], macs: NDArray[np.float64] | None = None
) -> Calibration:
    """Constant, scale and time of a multiply-accumulate by least relative squares, none negative.

    A second fit leaves out the worst-fitting quarter of the networks: one that was measured while
    the machine was busy must not bend the line.

    Args:
        layers: (N,) nanoseconds of the networks' layers.
        measured: (N,) nanoseconds of the networks.
        macs: (N,) multiply-accumulates of the layers; None leaves that term out.
    """
    terms = [np.ones(len(measured)), layers.astype(np.float64)]
    design = np.stack([*terms, *([] if macs is None else [macs])], axis=1)
    chosen = np.arange(len(measured))
    found = np.zeros(design.shape[1])
    for _ in range(2):
        found = _fit(design[chosen], measured[chosen])
        errors = np.abs(design @ found - measured) / measured
        chosen = np.argsort(errors, kind="stable")[: max(2, -(-3 * len(measured) // 4))]
    return Calibration(*found.tolist())


def _fit(design: NDArray[np.float64], measured: NDArray[np.float64]) -> NDArray[np.float64]:
    """Coefficients of least relative squares, of which none is negative.

    There are three at most, so every choice of those that are not zero is tried. The smaller of
    two equal choices, and the scale before the constant, are kept.
    """
    relative = design / measured[:, None]
    best, least = np.zeros(design.shape[1]), np.inf
    order = [1, 0, *range(2, design.shape[1])]
    for size in range(1, len(order) + 1):
        for used in combinations(order, size):
            columns = list(used)
            if np.linalg.matrix_rank(relative[:, columns]) < size:
                continue
            part = np.linalg.lstsq(relative[:, columns], np.ones(len(measured)))[0]
            error = float(np.square(relative[:, columns] @ part - 1).sum())
            if (part >= 0).all() and error < least - 1e-12:
                best, least = np.zeros(design.shape[1]), error
                best[columns] = part
    return best


def build_layer(shape: LayerShape, inputs: int, outputs: int) -> nn.Module:
    """A layer of given widths, with random weights, in evaluation mode."""
    if shape.kind == "linear":
        return nn.Linear(inputs, outputs, bias=shape.bias).eval()
    groups = shape.groups or outputs // shape.part[1]
    convolution = nn.Conv2d(
        groups * (inputs if shape.groups else shape.part[0]),
        outputs,
        shape.kernel,
        stride=shape.stride,
        padding=shape.padding,
        dilation=shape.dilation,
        groups=groups,
        bias=shape.bias,
    )
    if shape.batch_norm:
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs)).eval()
    return convolution.eval()


def make_input(shape: LayerShape, layer: nn.Module, batch: int) -> Tensor:
    """Random input of a layer for `batch` images."""
    first = layer[0] if isinstance(layer, nn.Sequential) else layer
    if isinstance(first, nn.Linear):
        return torch.randn(batch * shape.height, first.in_features)
    assert isinstance(first, nn.Conv2d)
    return torch.randn(batch, first.in_channels, shape.height, shape.width)


def make_layer(
    shape: LayerShape, inputs: int, outputs: int, settings: Settings
) -> tuple[nn.Module, Tensor]:
    """A layer of given widths with its input, on the device of the settings."""
    layer = build_layer(shape, inputs, outputs)
    x = make_input(shape, layer, settings.batch)
    return layer.to(settings.device), x.to(settings.device)


def _summarise(shape: LayerShape, inputs: int, outputs: int, passes: list[float]) -> Cell:
    first, median, third = statistics.quantiles(passes, n=4, method="inclusive")
    return Cell(shape, inputs, outputs, 1e6 * median, 1e6 * third - 1e6 * first, len(passes))
