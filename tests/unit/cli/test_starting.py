"""Commands to begin with, options of all commands, and settings without a file."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from cacp_ray.cli import app
from cacp_ray.cli.app import _first_options
from cacp_ray.cli.options import parse_rates, print_json
from cacp_ray.cli.starting import KINDS, list_recipes
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError
from tests.unit.reporting.synthetic import make_result, make_run

RECIPES = sorted(path.stem for path in Path("tune_configs").glob("*.yaml"))


def test_recipes_are_listed_and_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("init")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()[:-1]] == RECIPES
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("init", "quickstart")
    assert (code, out) == (0, "written: quickstart.yaml\n")
    assert (tmp_path / "quickstart.yaml").read_text() == list_recipes()["quickstart"]
    (tmp_path / "quickstart.yaml").write_text("mine")
    code, _, err = run("init", "tune_configs/quickstart.yaml")
    assert code == 2
    assert "quickstart.yaml exists" in err
    assert (tmp_path / "quickstart.yaml").read_text() == "mine"
    code, _, err = run("init", "quikstart")
    assert code == 2
    assert "unknown recipe 'quikstart': did you mean quickstart" in err


@pytest.mark.parametrize("kind", KINDS)
def test_editors_get_the_schema_of_every_kind_of_file(run, kind):
    code, out, _ = run("schema", kind)
    assert code == 0
    schema = json.loads(out)
    assert schema["type"] == "object"
    assert schema["additionalProperties"] is False
    assert schema["properties"]


def test_an_unknown_kind_of_file_is_one_line(run):
    code, _, err = run("schema", "serch")
    assert code == 2
    assert "did you mean search" in err


def test_the_version_is_that_of_the_package(run):
    assert run("--version")[:2] == (0, metadata.version("cacp-ray") + "\n")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["search", "x", "--quiet"], ["--quiet", "search", "x"]),
        (["search", "--debug", "x", "--resume"], ["--debug", "search", "x", "--resume"]),
        (["evaluate", "--", "--quiet"], ["evaluate", "--", "--quiet"]),
    ],
)
def test_options_of_all_commands_stand_anywhere(given, expected):
    assert _first_options(given) == expected


def test_every_command_has_a_panel():
    assert all(command.rich_help_panel for command in app.registered_commands)


def test_settings_without_a_file_are_searched_under_the_name_of_the_network(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    settings = ["rates=[0.5]", "evaluations=6", "data.search.rows=[0, 50]"]
    settings += ["data.search.path=embedded:search"]
    code, out, err = run("search", *settings, "--dry-run")
    assert code == 0, err
    assert "0.50" in out
    assert not any(tmp_path.iterdir())
    (tmp_path / "mine.yaml").write_text("rates: [0.3]\n")
    code, out, err = run("search", "mine.yaml", *settings, "--dry-run")
    assert code == 0, err
    assert "0.50" in out


def test_output_for_programs_is_json(run):
    code, out, _ = run("data", "inspect", "embedded:search", "--json")
    summary = json.loads(out)
    assert code == 0
    assert (summary["rows"], summary["sizes"], summary["broken"]) == (1500, [[32, 32, 1000]], None)
    code, out, _ = run("inspect", "resnet20", "--json")
    network = json.loads(out)
    assert code == 0
    assert (network["macs"], network["params"]) == (40_813_184, 272_474)
    assert len(network["groups"]) == 12
    assert 0 < network["smallest_rate"] < 0.1


def test_a_report_for_programs_is_its_result(run, tmp_path):
    folder = make_run(tmp_path / "run", make_result())
    code, out, err = run("report", folder, "--json")
    assert code == 0, err
    content = json.loads(out)
    assert content["name"] == make_result()["name"]
    assert content["report"] == str(folder / "report.html")


def test_numbers_that_json_lacks_are_null(capsys):
    print_json({"a": [1.0, float("nan")], "b": (float("inf"),)})
    assert json.loads(capsys.readouterr().out) == {"a": [1.0, None], "b": [None]}


@pytest.mark.parametrize(
    ("text", "rates"), [("50%", [0.5]), ("0.3", [0.3]), ("20%:60%:20%", [0.2, 0.4, 0.6])]
)
def test_rates_are_read_as_shares_and_as_percent(text, rates):
    assert parse_rates(text) == rates


def test_rates_of_a_file_are_read_as_percent():
    config = load_config(RunConfig, {"rates": ["30%", 0.5]})
    assert config.rates == (0.3, 0.5)
    with pytest.raises(ConfigError, match=r"rates\.0"):
        load_config(RunConfig, {"rates": ["many%"]})


def test_networks_of_other_packages_are_suggested(run):
    code, _, err = run("inspect", "resnet18")
    assert code == 2
    assert "write torchvision:resnet18" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to search: give a YAML file"),
        (["a.yaml", "b.yaml"], "b.yaml: give one YAML file"),
        (["rates=0.5,"], "rates"),
        (["none.yaml", "seed=1"], "none.yaml"),
        (["modle.name=resnet20"], "unknown key modle"),
    ],
)
@pytest.mark.parametrize("command", ["search", "run"])
def test_settings_that_are_none_are_one_line(run, command, arguments, message):
    code, _, err = run(command, *arguments)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1
