"""Latency of networks, measured in turn so that drift of the machine affects all alike.

A round runs every model once. A speed-up is the median of one ratio a round: both sides of a ratio
are measured at nearly the same time.
"""

import copy
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from cacp_ray.pruning.torch_types import as_channels_last

WARMUP_SHARE = 0.25
CPU = torch.device("cpu")
Clock = Callable[[], float]  # seconds
Networks = Sequence[tuple[nn.Module, Tensor]]  # each with its input, on the same device
# (networks, least rounds, most rounds, seconds) -> milliseconds of each network's passes
Timer = Callable[[Networks, int, int, float], list[list[float]]]


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
    x = _as_timed(example_input)
    copies = {name: _copy_for_timing(model) for name, model in models.items()}
    passes = {name: partial(model, x) for name, model in copies.items()}
    with use_threads(threads), torch.inference_mode():
        return measure_passes(
            passes, repeats=repeats, warmup=warmup, seconds=seconds, clock=clock, device=x.device
        )


def measure_passes(
    passes: Mapping[str, Callable[[], object]],
    *,
    repeats: int = 50,
    warmup: int = 5,
    seconds: float = 60.0,
    clock: Clock | None = None,
    device: torch.device | None = None,
    least: int = 1,
) -> dict[str, Latency]:
    """Times passes in turn, each after an untimed one; the settings are those of `measure_latency`.

    Args:
        passes: What runs a network once, by its name.
        repeats: Rounds to time.
        warmup: Untimed rounds before.
        seconds: No round begins later than this.
        clock: Clock of a pass.
        device: Device whose work is waited for; None is the CPU.
        least: Rounds that are timed however long they take.
    """
    started, clock, device = time.perf_counter(), clock or time.perf_counter, device or CPU
    calls = list(passes.values())
    _run_rounds(calls, warmup, started + WARMUP_SHARE * seconds, clock, device)
    rounds = _run_rounds(calls, repeats, started + seconds, clock, device, least)
    columns = zip(*rounds, strict=True)
    return {name: Latency(column) for name, column in zip(passes, columns, strict=True)}


def torch_timer(clock: Clock) -> Timer:
    """Times networks in PyTorch, as `measure_latency` does."""

    def run(networks: Networks, least: int, most: int, seconds: float) -> list[list[float]]:
        passes = {
            str(index): partial(_copy_for_timing(net), _as_timed(x))
            for index, (net, x) in enumerate(networks)
        }
        with torch.inference_mode():
            measured = measure_passes(
                passes, repeats=most, warmup=1, seconds=seconds, clock=clock, least=least,
                device=networks[0][1].device,
            )  # fmt: skip
        return [list(latency.rounds_ms) for latency in measured.values()]

    return run


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


def _as_timed(x: Tensor) -> Tensor:
    x = x.float() if x.is_floating_point() else x
    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


def _copy_for_timing(model: nn.Module) -> nn.Module:
    return as_channels_last(copy.deepcopy(model).float().eval())


def _run_rounds(
    calls: Sequence[Callable[[], object]],
    limit: int,
    deadline: float,
    clock: Clock,
    device: torch.device,
    least: int = 1,
) -> list[tuple[float, ...]]:
    """Milliseconds of each pass in up to `limit` rounds; at least `least`, none begun too late."""
    rounds: list[tuple[float, ...]] = []
    while len(rounds) < least or (len(rounds) < limit and time.perf_counter() < deadline):
        rounds.append(tuple(time_pass(call, clock, device) for call in calls))
    return rounds


def time_pass(call: Callable[[], object], clock: Clock, device: torch.device) -> float:
    """Milliseconds of one pass, right after an untimed one."""
    call()
    _wait_for(device)
    started = clock()
    call()
    _wait_for(device)
    return 1000 * (clock() - started)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
