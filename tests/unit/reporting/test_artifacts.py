"""Networks as artifacts: a table of all rates, and their folders."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from cacp_ray.reporting.artifacts import list_networks, log_networks
from tests.unit.reporting.synthetic import make_result


@pytest.fixture
def calls(monkeypatch):
    """Calls of the parts of wandb and mlflow that are used."""
    seen = []

    def note(name, answer=None):
        return lambda *arguments, **options: seen.append((name, arguments, options)) or answer

    run = SimpleNamespace(log=note("log"), log_artifact=note("log_artifact"), finish=note("finish"))
    wandb = SimpleNamespace(
        init=note("init", run),
        Table=note("Table", "table"),
        Artifact=note("Artifact", SimpleNamespace(add_dir=note("add_dir"))),
    )
    mlflow = SimpleNamespace(
        set_experiment=note("set_experiment"),
        start_run=note("start_run", nullcontext()),
        log_table=note("log_table"),
        log_artifacts=note("log_artifacts"),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    return seen


def test_the_table_has_the_base_and_every_rate():
    result = make_result()
    heads, rows = list_networks(result)
    assert heads[:2] == ["rate", "cost_kept"]
    assert [row[0] for row in rows] == ["base", *(f"{row['rate']:.2f}" for row in result["rates"])]
    assert all(len(row) == len(heads) for row in rows)


def test_loggers_that_take_artifacts_get_table_and_subnets(calls, tmp_path):
    log_networks(("tensorboard", "wandb", "mlflow"), "mine", tmp_path, make_result())
    assert [name for name, _, _ in calls] == [
        "init", "Table", "log", "Artifact", "add_dir", "log_artifact", "finish",
        "set_experiment", "start_run", "log_table", "log_artifacts",
    ]  # fmt: skip
    by_name = {name: (arguments, options) for name, arguments, options in calls}
    assert by_name["add_dir"][0] == (str(tmp_path / "subnets"),)
    assert by_name["log_artifacts"][0] == (str(tmp_path / "subnets"), "subnets")
    assert by_name["log_table"][0][0]["rate"][0] == "base"


def test_other_loggers_take_none(calls, tmp_path):
    log_networks(("tensorboard", "csv", "json"), "mine", tmp_path, make_result())
    assert not calls
