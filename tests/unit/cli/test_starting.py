"""Commands to begin with, options of all commands, and settings without a file."""

import json
from importlib import metadata
from pathlib import Path

import pytest

from cacp_ray.cli import app
from cacp_ray.cli.app import _first_options
from cacp_ray.cli.starting import KINDS, list_recipes

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
