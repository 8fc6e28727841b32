"""From a measured table to a search: the command, the configuration, the budget, the report."""

import dataclasses
import json
import re

import numpy as np
import pytest
import yaml

from cacp_ray.cli.app import state
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.latency_table import load_table, save_table
from cacp_ray.evaluation.measurement import TOP1, LocalEvaluator
from cacp_ray.reporting.summary import size_columns, summary_rows
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.budget import uniform
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.workflows.latencies import predict_latencies
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.strategy import make_run_strategy
from tests.small import measurement_of
from tests.toy import toy_score

RATES = (0.6, 0.8)
BOTH = {"macs": 1.0, "latency": 1.2}


@pytest.fixture(scope="module")
def table_path(tmp_path_factory):
    """A table of ResNet-20, with times that follow the MACs instead of this machine."""
    from cacp_ray.evaluation.latency_table import Settings
    from cacp_ray.evaluation.layer_timing import measure_table
    from cacp_ray.workflows.analyze import inspect_model

    found = inspect_model("resnet20").analysis
    table = measure_table(
        "resnet20", found.model, found.plan, Settings(), points=2, seconds=0.0, networks=2
    )
    cells = tuple(
        dataclasses.replace(cell, nanoseconds=1000.0 + 3.0 * cell.inputs * cell.outputs)
        for cell in table.cells
    )
    calibration = dataclasses.replace(table.calibration, constant=5000.0, scale=1.5)
    path = tmp_path_factory.mktemp("latency") / "table.parquet"
    save_table(dataclasses.replace(table, cells=cells, calibration=calibration), path)
    return path


def read_config(table_path, cost, **values):
    given = {"cost": cost, "latency_table": str(table_path), "rates": RATES, **values}
    return load_config(RunConfig, {"pruning": {"calibration_images": 16}, **given})


def test_the_command_measures_a_table(run, tmp_path):
    path = tmp_path / "new" / "table.parquet"
    arguments = ["latency", "measure", "resnet20", "--side", 8, "--points", 2, "--seconds", 0]
    code, out, err = run(*arguments, "--out", path)
    assert (code, err) == (0, "")
    assert "8 layer shapes" in out
    table = load_table(path)
    assert (table.network, table.input_shape) == ("resnet20", (3, 8, 8))


def test_a_table_may_be_of_an_input_that_is_no_square(run, tmp_path):
    path = tmp_path / "table.parquet"
    options = ["--input-shape", "3,8,16", "--points", 2, "--seconds", 0, "--out", path]
    code, _, err = run("latency", "measure", "resnet20", *options)
    assert (code, err) == (0, "")
    assert load_table(path).input_shape == (3, 8, 16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--input-shape", "3,8"], "does not run"),
        (["--input-shape", "3;8;8"], "--input-shape 3;8;8: write whole numbers"),
        (["--device", "tpu"], "device tpu: choose cpu or cuda"),
        (["--out", "."], "is a folder: name a file"),
        (["--points", 1], "points"),
        (["--num-classes", 0], "num-classes"),
    ],
)
def test_bad_options_are_refused_in_one_line(run, tmp_path, options, message):
    path = tmp_path / "table.parquet"
    code, _, err = run("latency", "measure", "resnet20", "--out", path, *options)
    assert code == 2
    assert message in err
    assert "Traceback" not in err
    assert not path.exists()


def test_an_interrupted_measurement_writes_nothing(run, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("cacp_ray.evaluation.layer_timing.measure_table", interrupt)
    path = tmp_path / "table.parquet"
    code, _, err = run("--quiet", "latency", "measure", "resnet20", "--out", path)
    state["quiet"] = False
    assert code == 1
    assert err == f"cacp-ray: interrupted: {path} was not written\n"
    assert not path.exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cost": "flops"}, "cost: known: latency, macs, params"),
        ({"cost": {"macs": 1.0, "latencies": 2.0}}, "cost: did you mean latency"),
        ({"cost": {"macs": 1.5}}, "smallest weight must be 1"),
        ({"cost": {"macs": 1.0, "params": 0.5}}, "smallest weight must be 1"),
        ({"cost": {}}, "smallest weight must be 1"),
        ({"cost": "latency"}, "cost: latency needs latency_table"),
        ({"cost": "latency", "latency_table": "none.parquet"}, "none.parquet: no such file"),
    ],
)
def test_a_cost_that_does_not_fit_is_refused_in_one_line(run, tmp_path, values, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"name": "x", **values}))
    code, _, err = run("search", path, "--run-dir", tmp_path / "run")
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


def test_a_table_of_another_network_is_refused(run, tmp_path, table_path):
    path = tmp_path / "config.yaml"
    model = {"name": "vgg16", "weights": "embedded:resnet20_cifar10"}
    values = {"cost": "latency", "latency_table": str(table_path), "data": {"crop": 24}}
    path.write_text(yaml.safe_dump({"name": "x", **values}))
    code, _, err = run("search", path, "--run-dir", tmp_path / "run")
    assert code == 2
    assert re.search(r"table of resnet20 has no conv .* on 24x24 .*: measure this network", err)
    assert model["name"] not in err


@pytest.mark.parametrize("cost", ["latency", BOTH])
def test_a_search_on_latency_keeps_its_budgets(table_path, tmp_path, cost):
    config = read_config(table_path, cost, strategy="random", evaluations=12)
    setup = Setup.create(config)
    model = setup.plan.cost_model
    find_score = toy_score(model)

    def measure(candidate):
        score = find_score(candidate.keep_counts)
        return measurement_of(candidate.index, score, score, 1 - score, 100, 0.0)

    loop = SearchLoop(
        LocalEvaluator(measure), model, RunDirectory(tmp_path), rates=RATES, evaluations=12,
        cost=config.cost,
    )  # fmt: skip
    strategy = make_run_strategy(setup)
    loop.restore(strategy)
    while not loop.done:
        loop.tick(strategy)
    records = RunDirectory(tmp_path).read_records()
    assert len(records) == 12
    for record in records:
        assert record.cost_kept <= record.rate
        shares = {
            name: int(model.kind(name)(record.keep_counts))
            / int(model.kind(name)(model.num_channels))
            for name in ("macs", "latency")
        }
        if cost == "latency":
            assert shares["latency"] == record.cost_kept
        else:
            assert shares["macs"] <= record.rate
            assert shares["latency"] <= 1.2 * record.rate
    assert {rate for rate in RATES if loop.archive.best(rate)} == set(RATES)


def test_the_base_is_described_by_its_latency(table_path):
    config = read_config(table_path, "latency")
    assert " ms latency, reachable rates 0." in Setup.create(config).describe()
    config = read_config(table_path, BOTH)
    assert "macs and latency / 1.2, reachable rates" in Setup.create(config).describe()


@pytest.mark.slow
def test_a_run_is_not_continued_with_another_table(table_path, tmp_path):
    config = read_config(table_path, "latency")
    setup = Setup.create(config)
    groups = setup.prepare().describe_model()["groups"]
    base = {"cost": setup.budget.total, "search": {"score": 0.9, "images": 9}}
    described = {"sha256": setup.sha256, "groups": groups, "base": base, "metric": vars(TOP1)}
    (tmp_path / "model.json").write_text(json.dumps(described))
    assert Setup.create(config, tmp_path).saved == described
    table = load_table(table_path)
    slower = dataclasses.replace(table.calibration, constant=6000.0)
    save_table(dataclasses.replace(table, calibration=slower), tmp_path / "other.parquet")
    other = read_config(tmp_path / "other.parquet", "latency")
    with pytest.raises(ArtifactError, match="put the latency table back"):
        Setup.create(other, tmp_path)


def test_the_report_shows_predicted_beside_measured_latency(table_path):
    base = Setup.create(read_config(table_path, "macs"))
    counts = uniform(base.budget, [0.5], np.ones(len(base.plan.groups)))[0]
    row = {"rate": 0.5, "path": "half", "keep_counts": counts.tolist(), "cost_kept": 0.5,
           "macs": 1, "params": 1}  # fmt: skip
    whole = {"macs": 2, "params": 2, "search": None, "test": None}
    result = {"cost": "macs", "base": whole, "rates": [row]}
    predict_latencies(result, base, {"base": base.model, "half": base.model}, seconds=0.0)
    latency = base.plan.cost_model.latency
    assert row["predicted_latency_ms"] == int(latency(counts)) / 1e6
    assert (
        whole["predicted_latency_ms"]
        == base.plan.cost_model.latency(base.plan.cost_model.num_channels) / 1e6
    )
    assert row["measured_latency_ms"] > 0
    assert result["latency_table"]["batch"] == 1
    columns = size_columns(result)
    assert [(c.head, c.unit) for c in columns[-2:]] == [
        ("predicted", "ms"), ("measured", "ms")
    ]  # fmt: skip
    for shown in summary_rows(result):
        assert columns[-2].text(shown) == f"{shown['predicted_latency_ms']:.2f}"
