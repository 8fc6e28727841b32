"""Configuration of fine-tuning, and single subnet folders."""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

from cacp_ray.api import finetune
from cacp_ray.cli import app
from cacp_ray.config.finetune import FinetuneConfig
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError


def load(**values):
    return load_config(FinetuneConfig, {"finetune": {"epochs": 7, "lr": 0.05}, **values})


def test_workers_are_a_number_or_a_range():
    assert load(trials={"workers": 4}).trials.workers == 4
    assert load(trials={"workers": [2, 8]}).trials.workers == (2, 8)


def test_variants_say_what_differs():
    assert {name: recipe.lr for name, recipe in load().recipes.items()} == {"": 0.05}
    found = load(variants={"same": {}, "adam": {"optimizer": "adamw", "lr": "1e-3"}}).recipes
    assert list(found) == ["same", "adam"]
    assert found["same"] == load().finetune
    assert (found["adam"].lr, found["adam"].optimizer, found["adam"].epochs) == (1e-3, "adamw", 7)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": {"a": {"lrr": 1}}}, "variants: lrr"),
        ({"variants": {"a": {"epochs": 0}}}, "variants: epochs: .*greater than or equal to 1"),
        ({"variants": {"a/b": {}}}, "'a/b' is no name"),
        ({"variants": {"a": {"teacher": "larger"}}}, "all variants have one teacher"),
        ({"trials": {"gpus": -1}}, r"trials\.gpus"),
        ({"trials": {"gpus": 0.5, "workers": 2}}, r"workers of one trial need 1 each"),
        ({"trials": {"gpus": 1.5}}, r"trials\.gpus: at most 1"),
        ({"finetune": {"seed": -1}}, r"finetune\.seed: .*greater than or equal to 0"),
        ({"finetune": {"lr": float("inf")}}, r"finetune\.lr: .*finite"),
        ({"finetune": {"optimizer": "adamw"}}, r"auto is for sgd; give adamw a number$"),
        (
            {"trials": {"workers": 0}},
            r"trials\.workers: write one number, or the least",
        ),
        ({"trials": {"workers": [3, 2]}}, r"trials\.workers: write one number"),
        ({"trials": {"workers": [1, 2, 3]}}, r"trials\.workers: write one number"),
        ({"trials": {"workers": "many"}}, r"trials\.workers: write one number"),
        ({"trials": {"logging": ["tensorbord"]}}, r"trials\.logging\.0"),
        ({"finetune": {"ema": 1.0}}, r"finetune\.ema"),
        ({"finetune": {"optimizer": "lion"}}, r"finetune\.optimizer"),
        ({"trial": {}}, "unknown key trial; did you mean trials"),
    ],
)
def test_bad_values_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(**values)
    assert "\n" not in str(caught.value)


def test_published_weights_bring_their_transforms_to_a_subnet_outside_its_run_too():
    model = {"name": "torchvision:mobilenet_v2", "weights": "IMAGENET1K_V1"}
    data = {name: {"path": f"embedded:{name}"} for name in ("train", "search", "test")}
    run = load_config(RunConfig, {"model": model, "data": data}).data
    assert load(model=model, data=data).data == run
    assert (run.resize, run.crop) == (256, 224)
    assert load(model=model, data=data | {"crop": 192}).data == run.model_copy(update={"crop": 192})
    assert load(model=model).data is None


def test_a_subnet_outside_a_run_needs_data_and_for_distillation_its_base(tmp_path):
    folder = tmp_path / "subnet"
    folder.mkdir()
    (folder / "subnet.json").write_text(
        json.dumps({"schema_version": 1, "rate": 0.5, "model": "resnet20", "num_classes": 10})
    )
    with pytest.raises(ConfigError, match="give its data by --config"):
        finetune(folder)
    config = load(data={}, finetune={"distillation": 0.5})
    with pytest.raises(ConfigError, match="name the base network"):
        finetune(folder, config=config)
    with pytest.raises(ArtifactError, match="holds no run"):
        finetune(tmp_path)


PAGE = Path("docs/finetuning.md").read_text()


def test_the_page_shows_a_file_that_loads_and_commands_that_parse():
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    config = load_config(FinetuneConfig, yaml.safe_load(block))
    assert list(config.recipes) == ["plain", "adamw"]
    commands = re.findall(r"^    cacp-ray (.+)$", PAGE, re.MULTILINE)
    assert len(commands) == 11
    for line in commands:
        name, *arguments = shlex.split(line)
        typer.main.get_command(app).commands[name].make_context(
            name, arguments, resilient_parsing=False
        )


def test_the_page_names_the_keys_and_defaults_of_trials():
    rows = dict(re.findall(r"^\| `trials\.(\w+)`[^|]* \| ([^|]+) \|", PAGE, re.MULTILINE))
    trials = FinetuneConfig.model_fields["trials"].default
    assert rows["workers"] == str(trials.workers)
    assert rows["scheduler"] == f"`{trials.scheduler}`"
    assert rows["logging"] == f"`[{', '.join(trials.logging)}]`"
    assert {*rows, "gpus"} == set(type(trials).model_fields)
