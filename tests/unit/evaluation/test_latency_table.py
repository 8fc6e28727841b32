import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn

from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation import layer_timing
from cacp_ray.evaluation.latency_table import Settings, load_table, save_table
from cacp_ray.evaluation.layer_timing import (
    build_layer,
    choose_widths,
    draw_counts,
    fit_calibration,
    make_input,
    measure_table,
)
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.latency_cost import Calibration
from cacp_ray.pruning.planner import make_plan
from cacp_ray.workflows.setup import with_latency
from tests.small import mostly_slow


class Small(nn.Module):
    """A plain, a depthwise and a grouped convolution, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12)
        self.lanes = nn.Conv2d(12, 20, 1, groups=2)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        x = self.lanes(self.depthwise(torch.relu(self.bn(self.conv(x)))))
        return self.fc(x.mean((2, 3)))


def plan_of(model, side=8):
    return make_plan(model.eval(), torch.zeros(1, 3, side, side))


@pytest.fixture(scope="module")
def measured():
    model = Small()
    plan, seen = plan_of(model), []
    table = measure_table(
        "small", model, plan, Settings(), points=3, seconds=0.0, networks=4,
        on_progress=lambda *visit: seen.append(visit),
    )  # fmt: skip
    return plan, table, seen


def test_every_layer_is_measured_at_every_width(measured):
    plan, table, seen = measured
    shapes = {str(layer.shape): layer.shape for layer in plan.cost_model.layers}
    assert set(table.grids) == set(shapes.values())
    conv, fc = shapes["conv 3x3 stride 2 on 8x8"], shapes["linear"]
    assert conv.batch_norm
    assert not conv.bias
    assert table.grids[conv].inputs.tolist() == [3]
    assert table.grids[conv].outputs.tolist() == [1, 6, 12]
    assert table.grids[fc].outputs.tolist() == [5]
    assert all(cell.nanoseconds > 0 and cell.repeats >= 6 for cell in table.cells)
    assert seen[-1] == ("whole networks", 15, 15)


def test_a_saved_table_is_read_again_with_how_it_was_measured(measured, tmp_path):
    plan, table, _ = measured
    path = tmp_path / "table.parquet"
    save_table(table, path)
    again = load_table(path)
    assert again == table
    about = json.loads(pq.read_schema(path).metadata[b"cacp_ray.latency"])
    assert about["settings"] == {
        "device": "cpu", "threads": 1, "batch": 1, "runtime": "torch", "command": None,
    }  # fmt: skip
    assert (about["dtype"], about["memory_format"]) == ("float32", "channels_last")
    assert about["torch"] == torch.__version__
    counts = draw_counts(plan, 20, 1, np.random.default_rng(0))
    np.testing.assert_array_equal(
        again.cost(plan.cost_model)(counts), with_latency(plan, table).cost_model.latency(counts)
    )


def test_a_table_of_another_network_is_refused(measured):
    _, table, _ = measured
    with pytest.raises(ConfigError, match="no conv 3x3 stride 2 on 16x16 of 3 to 12 channels"):
        table.cost(plan_of(Small(), side=16).cost_model)
    wider = Small()
    wider.lanes, wider.fc = nn.Conv2d(12, 40, 1, groups=2), nn.Linear(40, 5)
    with pytest.raises(ConfigError, match="to 40 channels: measure this network"):
        table.cost(plan_of(wider).cost_model)


def test_what_differs_from_the_measurement_is_said(measured):
    _, table, _ = measured
    assert table.differences("small", table.round_to) == []
    other = dataclasses.replace(
        table, processor="abacus", torch="0.1", settings=Settings(threads=10_000)
    )
    assert [line.split(",")[0] for line in other.differences("large", 1)] == [
        "it was calibrated on small",
        "it was measured on abacus",
        "it was measured with 10000 threads",
        "it was measured with torch 0.1",
    ]


def test_steps_between_those_measured_are_said(measured):
    _, table, _ = measured
    coarse = dataclasses.replace(table, round_to=8)
    assert coarse.differences("small", 16) == []
    (line,) = coarse.differences("small", 12)
    assert line.startswith("it was measured at multiples of 8, pruning.round_to is 12")


def test_a_file_that_is_no_table_is_refused(measured, tmp_path):
    _, table, _ = measured
    path = tmp_path / "t.parquet"
    with pytest.raises(ArtifactError, match="no such file; make one"):
        load_table(path)
    path.write_text("no")
    with pytest.raises(ArtifactError, match="not a Parquet file"):
        load_table(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(ArtifactError, match="is no latency table"):
        load_table(path)
    lost = next(cell for cell in table.cells if cell.shape.groups == 2)
    cells = tuple(cell for cell in table.cells if cell != lost)
    save_table(dataclasses.replace(table, cells=cells), path)
    with pytest.raises(ArtifactError, match="lacks widths of conv 1x1 of 2 groups"):
        load_table(path)


def test_devices_that_are_not_here_are_refused(monkeypatch):
    Settings().check()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device, message in (("cuda", "no CUDA device"), ("tpu", "choose cpu or cuda")):
        with pytest.raises(ConfigError, match=message):
            Settings(device).check()


@pytest.mark.parametrize(
    "name",
    mostly_slow(
        ["resnet20", "torchvision:mobilenet_v2", "torchvision:resnext50_32x4d"], ["resnet20"]
    ),
)
def test_layers_are_built_as_the_network_has_them(name):
    model = build_model(name, 10)
    plan = plan_of(model, 32)
    whole = plan.cost_model.num_channels
    # In the order of their definition, which here is about that of the pass.
    modules = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    built = []
    for layer in plan.cost_model.layers:
        inputs, outputs = layer.inputs @ whole + layer.input_bias, layer.outputs @ whole
        layer_alone = build_layer(layer.shape, round(inputs), round(outputs + layer.output_bias))
        assert layer_alone(make_input(layer.shape, layer_alone, 2)).shape[0] == 2
        built.append(layer_alone[0] if isinstance(layer_alone, nn.Sequential) else layer_alone)
    assert sorted(map(repr, built)) == sorted(map(repr, modules))


def test_layers_of_one_shape_share_a_grid_that_suits_the_narrow_ones():
    plan = plan_of(build_model("resnet20", 10), 32)
    widths = choose_widths(plan.cost_model.layers, plan.cost_model.num_channels, 5)
    by_name = {str(shape): own for shape, own in widths.items()}
    assert by_name["conv 3x3 stride 1 on 32x32"] == ((1, 3, 5, 8, 12, 16), (1, 5, 8, 12, 16))
    assert by_name["linear"] == ((1, 17, 32, 48, 64), (10,))
    widths = choose_widths(plan.cost_model.layers, plan.cost_model.num_channels, 5, round_to=8)
    by_name = {str(shape): own for shape, own in widths.items()}
    assert by_name["linear"] == ((8, 24, 32, 48, 64), (10,))
    assert layer_timing._spread([(64, True), (20, True)], 3, 1) == (1, 10, 20, 32, 64)


def test_the_calibration_finds_the_line_and_leaves_out_the_networks_that_were_disturbed():
    layers = np.arange(1, 13) * 1000
    measured = 500 + 1.5 * layers
    calibration = fit_calibration(layers, measured)
    assert (calibration.constant, calibration.scale) == pytest.approx((500, 1.5))
    measured[[3, 7]] *= 4
    calibration = fit_calibration(layers, measured)
    assert (calibration.constant, calibration.scale) == pytest.approx((500, 1.5), rel=0.02)


def test_the_calibration_finds_what_layers_and_multiplications_explain():
    rng = np.random.default_rng(0)
    layers, macs = rng.integers(1000, 9000, 24), rng.uniform(1e5, 9e5, 24)
    measured = 400 + 0.3 * layers + 0.005 * macs
    calibration = fit_calibration(layers, measured, macs)
    assert dataclasses.astuple(calibration) == pytest.approx((400, 0.3, 0.005))
    assert fit_calibration(layers, 400 + 0.3 * layers, macs).per_mac == pytest.approx(0, abs=1e-9)


def test_a_table_of_before_multiplications_counted_is_read(measured, tmp_path):
    _, table, _ = measured
    save_table(table, tmp_path / "new.parquet")
    parquet = pq.read_table(tmp_path / "new.parquet")
    about = json.loads(parquet.schema.metadata[b"cacp_ray.latency"])
    del about["calibration"]["per_mac"], about["settings"]["runtime"], about["settings"]["command"]
    parquet = parquet.replace_schema_metadata({b"cacp_ray.latency": json.dumps(about).encode()})
    pq.write_table(parquet, tmp_path / "old.parquet")
    old = load_table(tmp_path / "old.parquet")
    assert old.calibration.per_mac == 0
    assert old.settings == Settings()


def test_the_calibration_is_never_negative():
    layers = np.arange(1, 13) * 1000
    calibration = fit_calibration(layers, 1.5 * layers - 500)
    assert calibration.constant == 0
    assert 0 < calibration.scale < 1.5
    assert fit_calibration(layers, 20_000.0 - layers).scale == 0
    assert fit_calibration(layers[:1], np.array([2000.0])) == Calibration(0.0, 2.0)
