import pytest
import torch
from torch import Tensor, nn

from cacp_ray.evaluation import latency
from cacp_ray.evaluation.latency import Latency, measure_latency, speedup

X = torch.zeros(1, 3, 4, 4)


class Recorder(nn.Module):
    """A network that notes its inputs in a list, which its copies share."""

    def __init__(self, name: str, calls: list) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1).double()
        self.name = name
        self.calls = calls

    def __deepcopy__(self, memo: dict) -> "Recorder":
        clone = Recorder(self.name, self.calls)
        clone.load_state_dict(self.state_dict())
        return clone

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.name, self, x, torch.is_inference_mode_enabled()))
        return self.conv(x)


def measure_recorders(*names: str, **settings) -> tuple[dict[str, Latency], list]:
    calls: list = []
    models = {name: Recorder(name, calls) for name in names}
    return measure_latency(models, X, **settings), calls


def test_models_are_measured_in_turn():
    latencies, calls = measure_recorders("base", "half", "third", repeats=3, warmup=1)
    timed = [name for name, *_ in calls][1::2]
    assert timed == ["base", "half", "third"] * 4
    assert [len(latency.rounds_ms) for latency in latencies.values()] == [3, 3, 3]


def test_every_timed_pass_follows_an_untimed_one_of_the_same_model():
    names = [name for name, *_ in measure_recorders("base", "half", repeats=2, warmup=2)[1]]
    assert names[0::2] == names[1::2]


def test_passes_are_float32_channels_last_in_evaluation_and_inference_mode():
    _, calls = measure_recorders("base", repeats=1, warmup=0)
    for _, module, x, is_inference in calls:
        assert is_inference
        assert not module.training
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert {value.dtype for value in module.state_dict().values()} == {torch.float32}


def test_the_callers_models_and_threads_are_left_as_they_were():
    model = Recorder("base", [])
    before = torch.get_num_threads()
    measure_latency({"base": model}, X, threads=before + 1, repeats=1, warmup=0)
    assert model.training
    assert model.conv.weight.dtype == torch.float64
    assert torch.get_num_threads() == before


def test_threads_are_restored_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError):
        measure_latency({"broken": nn.Conv2d(5, 4, 1)}, X, threads=before + 1)
    assert torch.get_num_threads() == before


def test_no_round_begins_after_the_time_is_up(monkeypatch):
    clock = iter(float(second) for second in range(10_000))
    monkeypatch.setattr(latency.time, "perf_counter", lambda: next(clock))
    latencies, _ = measure_recorders("base", repeats=10_000, warmup=10_000, seconds=100)
    # Three readings a round: its beginning, and both sides of the pass.
    assert 20 <= len(latencies["base"].rounds_ms) <= 30


def test_one_round_is_always_finished():
    latencies, _ = measure_recorders("base", "half", repeats=50, warmup=5, seconds=0.0)
    assert {len(latency.rounds_ms) for latency in latencies.values()} == {1}


def test_median_and_quartiles_are_those_of_the_passes():
    times = Latency((1.0, 2.0, 3.0, 4.0, 100.0))
    assert times.median_ms == 3.0
    assert times.quartiles_ms == (2.0, 4.0)
    assert Latency((7.0,)).quartiles_ms == (7.0, 7.0)


def test_speedup_is_the_median_of_the_ratios_of_each_round():
    base = Latency((2.0, 20.0, 6.0))
    model = Latency((1.0, 5.0, 6.0))
    assert speedup(base, model) == 2.0  # of 2, 4 and 1; the ratio of the medians is 1.2


def test_drift_of_the_machine_leaves_the_speedup_alone():
    drift = [1.0, 1.5, 3.0, 8.0, 2.0]
    base = Latency(tuple(4 * milliseconds for milliseconds in drift))
    assert speedup(base, Latency(tuple(2 * milliseconds for milliseconds in drift))) == 2.0


def test_latencies_of_different_measurements_have_no_speedup():
    with pytest.raises(ValueError, match="shorter"):
        speedup(Latency((1.0, 2.0)), Latency((1.0,)))
