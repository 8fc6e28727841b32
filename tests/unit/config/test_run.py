"""A configuration is checked when it is read, and every problem names its key."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from cacp_ray.config.agent_tuning import AgentTuningConfig
from cacp_ray.config.finetune import FinetuneConfig
from cacp_ray.config.reading import load_config, resolved
from cacp_ray.config.run import RunConfig, TrainConfig
from cacp_ray.config.saved import check_unchanged
from cacp_ray.errors import ConfigError
from cacp_ray.io.files import changed_keys

RECIPES = sorted(Path("tune_configs").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path):
    kinds = {"train": TrainConfig, "agent": AgentTuningConfig, "finetune": FinetuneConfig}
    kind = kinds.get(path.stem.partition("_")[0], RunConfig)
    assert load_config(kind, path)
    comment = " ".join(line.lstrip("# ") for line in path.read_text().splitlines())
    cost = comment[comment.index("Cost") :]
    assert re.search(r"measured|estimate", cost)
    assert re.search(r"\d (seconds|minutes|hours|core-hours)|(a quarter of|half) an hour", cost)
    assert "not measured" not in cost


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rates=[1.5]"], r"rates\.0: .*less than or equal to 1 \(got 1\.5\)"),
        (["rates=[0]"], r"rates\.0: .*greater than 0"),
        (["rates=[0.5, 0.50000001]"], "differ within six decimals"),
        (["agent.noize=1"], r"unknown key agent\.noize; did you mean noise"),
        (["strateggy=cacp"], "unknown key strateggy; did you mean strategy"),
        (["pruning.recovery=magic"], r"pruning\.recovery: .*'compensate' \(got 'magic'\)"),
        (["finetune.epochs=0"], r"finetune\.epochs: .*greater than or equal to 1"),
        (["evaluations"], "write key.path=value"),
        (["evaluations=5"], "5 evaluations are too few for 3 rates: at least 9"),
        (["name.first=x"], "name is not a section"),
        (["rates=[0.5"], "not valid YAML"),
        (["data.std=[0, 1, 1]"], r"data\.std\.0: .*greater than 0"),
        (["agent.hidden=[-1]"], r"agent\.hidden\.0: .*greater than or equal to 1"),
        (["cluster.gpus_per_evaluator=some"], r"write a share of a GPU .* or auto \(got 'some'\)"),
        (["cluster.gpus_per_evaluator=1.5"], r"write a share of a GPU from 0 to 1, or auto"),
        (["cluster.gpus_per_evaluator=true"], r"write a share of a GPU from 0 to 1, or auto"),
    ],
)
def test_bad_values_are_refused_by_name(overrides, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(RunConfig, {"name": "x"}, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["- a\n", "a: [", "\x00"])
def test_a_file_that_is_no_configuration_is_refused_in_one_line(tmp_path, content):
    file = tmp_path / "c.yaml"
    file.write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_config(RunConfig, file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_config(RunConfig, "nowhere.yaml")


def test_resolved_form_loads_to_the_same_configuration():
    config = load_config(RunConfig, {"rates": [0.7, 0.3]}, ["agent.noise=0.2"])
    assert config.rates == (0.3, 0.7)
    again = load_config(RunConfig, yaml.safe_load(yaml.safe_dump(resolved(config))))
    assert again == config


def test_changed_keys_are_named_by_path():
    old, new = (resolved(RunConfig(evaluations=n)) for n in (50, 60))
    new["agent"]["noise"] = 0.1
    assert changed_keys(old, new) == ["agent.noise", "evaluations"]


def test_a_run_goes_on_with_more_evaluators_and_a_shorter_report_and_no_other_change():
    saved = resolved(RunConfig())
    for change in ("cluster.max_evaluators=9", "report.frontier=false", "report.latency=false"):
        check_unchanged(saved, load_config(RunConfig, {}, [change]), "runs/x", "--run-dir")
    changed = load_config(RunConfig, {}, ["seed=1", "evaluation.images=50"])
    with pytest.raises(ConfigError, match=r"runs/x was .* changed: evaluation\.images, seed; undo"):
        check_unchanged(saved, changed, "runs/x", "--run-dir")


def test_a_part_of_the_fine_tuning_recipe_leaves_the_rest_as_it_was():
    whole = RunConfig().finetune
    for kind in (RunConfig, FinetuneConfig):
        part = load_config(kind, {"finetune": {"epochs": 2}}).finetune
        assert part == dataclasses.replace(whole, epochs=2)
    assert load_config(RunConfig, {}, ["finetune.lr=0.5"]).finetune.lr == 0.5
