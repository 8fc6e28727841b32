"""Latency of networks, measured in turn so that drift of the machine affects all alike.

A round runs every model once. A speed-up is the median of one ratio a round: both sides of a ratio
are measured at nearly the same time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cacp_ray.pruning.torch_types import as_channels_last

WARMUP_SHARE = 0.25
Clock = Callable[[], float]  # seconds


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one pass a round; all models of one `measure_latency` share the rounds."""

    rounds_ms: tuple[float, ...]  # in the order measured

    @property
    def median_ms(self) -> float:
        """Median of the passes."""
        return statistics.median(self.rounds_ms)

    @property
    def quartiles_ms(self) -> tuple[float, float]:
        """First and third quartile of the passes."""
        if len(self.rounds_ms) == 1:
            return self.rounds_ms[0], self.rounds_ms[0]
        first, _, third = statistics.quantiles(self.rounds_ms, n=4, method="inclusive")
        return first, third


def measure_latency(
    models: dict[str, nn.Module],
    example_input: Tensor,
    *,
    threads: int | None = None,
    repeats: int = 50,
    warmup: int = 5,
    seconds: float = 60.0,
    clock: Clock | None = None,
) -> dict[str, Latency]:
    """Times forward passes in float32, channels_last, evaluation and inference mode.

    Copies of the models are measured. Each timed pass follows an untimed one of the same model,
    because the previous model of the round has emptied the caches. Two equal ResNet-20, measured in
    a round with a VGG-16, differ by 7 % without the untimed pass and by 1 to 3 % with it.

    Args:
        models: Models by name, on the device of `example_input`.
        example_input: (N, ...), images (N, C, H, W) as a rule; N is the batch that is timed.
        threads: Threads of torch while measuring; None leaves them as they are.
        repeats: Rounds to time.
        warmup: Untimed rounds before; they take at most a quarter of the time.
        seconds: No round begins later than this; one warm-up round and one timed round always run.
        clock: Clock of a pass, by default `time.perf_counter`. With one thread on the CPU,
            `time.thread_time` leaves out the time of other processes on a busy machine.

    Returns:
        The latency of each model; all have one pass for each finished round.
    """
    started, clock = time.perf_counter(), clock or time.perf_counter
    x = example_input.float() if example_input.is_floating_point() else example_input
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    copies = [_copy_for_timing(model) for model in models.values()]
    with use_threads(threads), torch.inference_mode():
        _run_rounds(copies, x, warmup, started + WARMUP_SHARE * seconds, clock)
        rounds = _run_rounds(copies, x, repeats, started + seconds, clock)
    columns = zip(*rounds, strict=True)
    return {name: Latency(passes) for name, passes in zip(models, columns, strict=True)}


@contextmanager
def use_threads(number: int | None) -> Generator[None]:
    """Sets torch's threads for a while; None leaves them as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def speedup(base: Latency, model: Latency) -> float:
    """How many times faster `model` is than `base`; both come from one `measure_latency`."""
    pairs = zip(base.rounds_ms, model.rounds_ms, strict=True)
    return statistics.median(whole / small for whole, small in pairs)


def _copy_for_timing(model: nn.Module) -> nn.Module:
    return as_channels_last(copy.deepcopy(model).float().eval())


def _run_rounds(
    models: list[nn.Module], x: Tensor, limit: int, deadline: float, clock: Clock
) -> list[tuple[float, ...]]:
    """Milliseconds of each model in up to `limit` rounds; at least one, none begun too late."""
    rounds: list[tuple[float, ...]] = []
    while not rounds or (len(rounds) < limit and time.perf_counter() < deadline):
        rounds.append(tuple(time_pass(model, x, clock) for model in models))
    return rounds


def time_pass(model: nn.Module, x: Tensor, clock: Clock) -> float:
    """Milliseconds of one pass, right after an untimed one."""
    model(x)
    _wait_for(x.device)
    started = clock()
    model(x)
    _wait_for(x.device)
    return 1000 * (clock() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
