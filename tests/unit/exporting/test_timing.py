"""Networks are timed in the runtime that deploys them, or by a program of the user's own."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from cacp_ray.errors import ConfigError, EvaluationError
from cacp_ray.evaluation.latency_table import Settings, load_table, save_table
from cacp_ray.evaluation.layer_timing import measure_table
from cacp_ray.exporting.timing import make_timer, run_command, write_quickly
from cacp_ray.pruning.planner import make_plan
from cacp_ray.workflows.latencies import can_time

PROGRAM = """
import sys, onnx
weights = sum(len(array.raw_data) for array in onnx.load(sys.argv[-1]).graph.initializer)
print("model:", sys.argv[-1])
print(f"mean {1 + weights / 1e4} ms")
"""


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_table_is_measured_in_a_runtime_and_read_again(runtime, tmp_path):
    model = small()
    plan = make_plan(model, torch.zeros(1, 3, 8, 8))
    settings = Settings(runtime=runtime)
    settings.check()
    table = measure_table(
        "small", model, plan, settings, points=2, seconds=0.0, networks=3,
        timer=make_timer(settings),
    )  # fmt: skip
    assert all(cell.nanoseconds > 0 and cell.repeats >= 6 for cell in table.cells)
    save_table(table, tmp_path / "table.parquet")
    assert load_table(tmp_path / "table.parquet").settings.runtime == runtime
    assert can_time(settings)


@pytest.fixture
def program(tmp_path):
    file = tmp_path / "time it.py"
    file.write_text(PROGRAM)
    return f"{sys.executable} '{file}'"


def test_a_program_times_layers_by_their_files(program):
    model = small()
    settings = Settings(runtime="command", command=program)
    x = torch.zeros(1, 3, 8, 8)
    (whole,), (less,) = make_timer(settings)(
        [(model, x), (nn.Sequential(*model[:2]).eval(), x)], 2, 30, 1.0
    )
    weights = sum(p.numel() for p in model.parameters()) - 2 * 8  # batch norm is folded
    assert whole == pytest.approx(1 + 4 * weights / 1e4)
    assert less < whole
    assert not can_time(settings)  # the device may be elsewhere


def test_the_last_number_counts():
    assert run_command("echo 3 runs: 1.25e-1 ms for", Path("/x.onnx")) == 0.125


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("no-such-program", "No such file"),
        ("false", "exit code 1"),
        ("true", "it printed no number"),
        ("printf", "it printed no number"),
        ("echo '", "No closing quotation"),
    ],
)
def test_a_program_that_tells_no_time_is_refused_in_one_line(command, message):
    with pytest.raises(ConfigError, match=message) as caught:
        run_command(command, Path("/x.onnx"))
    assert "\n" not in str(caught.value)
    assert command in str(caught.value)


def test_a_runtime_is_known_and_installed(monkeypatch):
    with pytest.raises(ConfigError, match="runtime tflite: choose torch, onnxruntime, openvino"):
        Settings(runtime="tflite").check()
    with pytest.raises(ConfigError, match="device cuda: openvino is timed on the CPU"):
        Settings("cuda", runtime="openvino").check()
    monkeypatch.setattr(
        "cacp_ray.exporting.formats.importlib.util.find_spec",
        lambda name: name != "openvino" or None,
    )
    with pytest.raises(ConfigError, match="runtime openvino needs openvino: pip install"):
        make_timer(Settings(runtime="openvino"))
    assert not can_time(Settings(runtime="openvino"))
    assert can_time(Settings(runtime="onnxruntime"))


class Odd(nn.Module):
    def forward(self, x):
        return torch.ops.aten.special_bessel_j0(x)


def test_a_network_that_cannot_be_written_is_one_line(tmp_path):
    with pytest.raises(EvaluationError, match="--runtime torch") as caught:
        write_quickly(Odd(), torch.zeros(1, 3), tmp_path / "x.onnx")
    assert "\n" not in str(caught.value)
