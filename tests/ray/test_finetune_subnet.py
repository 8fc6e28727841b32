"""One subnet folder fine-tuned alone by the command line, in a run or outside."""

import json

import pytest
import yaml
from safetensors.torch import load_file

import cacp_ray
from cacp_ray.config.reading import resolved
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.io.files import write_yaml
from cacp_ray.workflows.ladder import check_order
from tests.unit.exporting.folders import DEPTHWISE, make_folder

pytestmark = pytest.mark.ray

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DATA = {
    "train": {"path": "embedded:train", "rows": [0, 200]},
    "search": {"path": "embedded:search", "rows": [0, 100]},
    "test": {"path": "embedded:test", "rows": [0, 120]},
}
RECIPE = {"epochs": 1, "distillation": 0, "lr": 0.1}


@pytest.fixture
def subnet(tmp_path):
    """In the place where a run would have it; its run is not there."""
    folder = make_folder(tmp_path / "run" / "subnets" / "rate-0.50", DEPTHWISE, 32, num_classes=10)
    describe(folder, classes=CLASSES)
    return folder


def describe(folder, **values):
    description = json.loads((folder / "subnet.json").read_text())
    (folder / "subnet.json").write_text(json.dumps(description | values))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("stream", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_subnet_outside_its_run_is_trained_by_a_file_with_its_data(subnet, tmp_path, run, stream):
    file = tmp_path / "finetune.yaml"
    file.write_text(yaml.safe_dump({"data": DATA | {"stream": stream}, "finetune": RECIPE}))
    code, printed, errors = run("finetune", subnet, "--config", file)
    assert code == 0, errors
    assert "epoch 1/1" in printed
    metrics = json.loads((subnet / "metrics.json").read_text())
    assert f"test split {100 * metrics['test_score']:.2f} %" in printed
    assert (metrics["rate"], metrics["epochs"], metrics["test_images"]) == (0.5, 1, 120)
    before, after = (load_file(subnet / f"{name}.safetensors") for name in ("model", "finetuned"))
    assert before.keys() == after.keys()
    assert cacp_ray.load_subnet(subnet)
    code, _, errors = run("finetune", subnet, "--config", file)
    assert code == 2
    assert "holds a finished fine-tuning" in errors


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_subnet_of_a_run_takes_data_and_recipe_from_it(subnet, run):
    config = RunConfig.model_validate({"data": DATA, "finetune": RECIPE | {"seed": 3}})
    write_yaml(subnet.parent.parent / "config.yaml", resolved(config))
    file = subnet / "cpus.yaml"
    file.write_text("trials: {cpus: 1}")
    code, _, errors = run("finetune", subnet, "--config", file, "--set", "finetune.lr=0.2")
    assert code == 0, errors
    recipe = json.loads((subnet / "metrics.json").read_text())["recipe"]
    assert (recipe["seed"], recipe["lr"], recipe["epochs"]) == (3, 0.2, 1)


@pytest.mark.usefixtures("ray_cluster")
def test_other_data_or_another_scheduler_are_not_gone_on_with(subnet):
    config = {"data": DATA, "finetune": RECIPE}
    cacp_ray.finetune(subnet, config=config)
    assert cacp_ray.finetune(subnet, config=config, resume=True)["epochs"] == 1
    with pytest.raises(ConfigError, match=r"other settings \(data\.train\.rows"):
        cacp_ray.finetune(subnet, config=config, overrides=["data.train.rows=[0,300]"], resume=True)
    with pytest.raises(ConfigError, match=r"other settings \(trials\.scheduler"):
        cacp_ray.finetune(subnet, config=config, overrides=["trials.scheduler=asha"], resume=True)


def test_crops_larger_than_the_images_are_refused(subnet):
    variants = {"wide": {"padding": 32}}
    with pytest.raises(ConfigError, match=r"wide\.padding: 32 pixels, but images have 32"):
        cacp_ray.finetune(subnet, config={"data": DATA, "finetune": RECIPE, "variants": variants})
    assert not (subnet / "finetune").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_subnet_is_trained_on_images_as_it_was_searched_on(subnet):
    describe(subnet, mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], input_shape=[3, 64, 64])
    config = {"data": DATA, "finetune": RECIPE}
    with pytest.raises(ConfigError, match=r"images of \[3, 64, 64\] .* has \[3, 32, 32\]"):
        cacp_ray.finetune(subnet, config=config)
    assert not (subnet / "finetune").exists()
    describe(subnet, input_shape=[3, 32, 32])
    cacp_ray.finetune(subnet, config=config | {"data": DATA | {"std": [0.7, 0.7, 0.7]}})
    data = json.loads((subnet / "finetune" / "finetune.json").read_text())["data"]
    assert (data["mean"], data["std"]) == ([0.1, 0.2, 0.3], [0.7, 0.7, 0.7])


@pytest.mark.usefixtures("ray_cluster")
def test_a_subnet_alone_has_no_larger_one_to_learn_from(subnet):
    config = RunConfig.model_validate({"data": DATA, "finetune": RECIPE | {"teacher": "larger"}})
    write_yaml(subnet.parent.parent / "config.yaml", resolved(config))
    with pytest.raises(ConfigError, match=r"alone has no larger subnet: .*finetune\.teacher=base"):
        cacp_ray.finetune(subnet)
    assert not (subnet / "finetune").exists()


@pytest.mark.parametrize("settings", [{"model": {"name": "resnet20", "weights": None}}, {}])
def test_an_untrained_network_teaches_no_subnet(subnet, settings):
    config = {"data": DATA, "finetune": RECIPE | {"distillation": 0.5}, **settings}
    with pytest.raises(ConfigError, match="name the base network and its weights"):
        cacp_ray.finetune(subnet, config=config)
    assert not (subnet / "finetune").exists()


@pytest.mark.parametrize("is_larger", [True, False])
def test_a_fine_tuning_by_another_teacher_is_not_gone_on_with(tmp_path, is_larger):
    place = tmp_path if is_larger else tmp_path / "rate-0.5"
    place.mkdir(exist_ok=True)
    check_order(tmp_path, is_larger)
    (place / "finetune.json").touch()
    with pytest.raises(
        ArtifactError, match=r"begun with another finetune\.teacher or finetune\.order: undo"
    ):
        check_order(tmp_path, is_larger)
    check_order(tmp_path, not is_larger)


def test_data_of_other_classes_is_refused_before_anything_is_written(subnet):
    describe(subnet, classes=[*CLASSES[:-1], "lorry"])
    config = RunConfig.model_validate({"data": DATA, "finetune": RECIPE})
    write_yaml(subnet.parent.parent / "config.yaml", resolved(config))
    with pytest.raises(ConfigError, match="other classes"):
        cacp_ray.finetune(subnet)
    assert not (subnet / "finetune").exists()
