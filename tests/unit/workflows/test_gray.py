"""Gray images: read as one channel, for networks that take one, from the file to the subnet."""

import hashlib
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import DataConfig, RunConfig, TrainConfig
from cacp_ray.data.images import ImageSet, Rows, Shape, read_images
from cacp_ray.data.mixing import write_parquet
from cacp_ray.data.sources import open_source
from cacp_ray.data.transforms import augment
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.evaluation.task_scorer import make_scorer
from cacp_ray.exporting.subnet import export_subnet
from cacp_ray.pruning.subnet import load_subnet, read_description
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.training.loop import make_batches, train
from cacp_ray.training.metrics import measure_split
from cacp_ray.training.recipe import Recipe
from cacp_ray.workflows.analyze import inspect_model
from cacp_ray.workflows.evaluators import scorer_arguments
from cacp_ray.workflows.network import check_channels, find_channels
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.splits import Splits, find_normalisation
from cacp_ray.workflows.strategy import make_run_strategy
from cacp_ray.workflows.train import train_model
from cacp_ray.workflows.winners import build_here, build_winners

HEIGHT, WIDTH, CLASSES = 12, 10, ("dark", "light")
SCALE = {"mean": [0.13], "std": [0.31]}


class GrayNet(nn.Module):
    """Two convolutions that a search cuts, on images of any number of channels."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(channels, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second, self.fc = nn.Conv2d(12, 12, 3, padding=1), nn.Linear(12, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        return self.fc(self.second(x).relu().mean((2, 3)))


def make_gray(channels: int = 1, num_classes: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return GrayNet(channels, num_classes)


def make_images(number: int, seed: int) -> ImageSet:
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 2
    images = rng.integers(0, 120, (number, HEIGHT, WIDTH, 1)) + 120 * labels[:, None, None, None]
    return ImageSet(images.astype(np.uint8), labels, CLASSES)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A search on gray PNGs in Parquet files, without `model.kwargs`."""
    folder = tmp_path_factory.mktemp("gray")
    for seed, name in enumerate(("train", "search", "test")):
        write_parquet(folder / f"{name}.parquet", make_images(64, seed))
    save_file(make_gray().state_dict(), folder / "gray.safetensors")
    splits = {name: {"path": str(folder / f"{name}.parquet")} for name in ("train", "search")}
    return {
        "model": {"name": f"{__name__}:make_gray", "weights": str(folder / "gray.safetensors")},
        "data": {**splits, "test": {"path": str(folder / "test.parquet")}, **SCALE},
        "strategy": "uniform",
        "rates": [0.5],
        "evaluations": 3,
        "mode": "rounds",
        "pruning": {"calibration_images": 32},
        "evaluation": {"dtype": "float32"},
    }


def test_a_gray_split_has_one_channel_however_it_is_read(settings):
    data = load_config(DataConfig, settings["data"])
    split = Splits(data).read("search")
    assert split.images.shape == (64, HEIGHT, WIDTH, 1)
    assert np.array_equal(split.images, make_images(64, 1).images)
    pixels = torch.tensor(split.images).movedim(3, 1) / 255
    assert torch.allclose(split.tensors()[0], (pixels - 0.13) / 0.31, atol=1e-6)
    stream = Splits(data.model_copy(update={"stream": True})).open("search")
    (streamed,) = stream.parts(64)
    assert np.array_equal(streamed.images, split.images)
    for images in (split, stream):
        batch, _ = next(make_batches(images, Recipe(batch_size=16, erasing=0.5)).epoch(0))
        assert batch.shape == (16, 1, HEIGHT, WIDTH)


def test_colour_images_become_gray_and_deeper_ones_are_refused(tmp_path):
    for name, image in (
        ("a", Image.new("RGB", (6, 5), (255, 0, 0))),
        ("b", Image.new("L", (6, 5), 7)),
        ("c", Image.new("1", (6, 5), 1)),
    ):
        (tmp_path / name).mkdir()
        image.save(tmp_path / name / "x.png")
    read = read_images(open_source(str(tmp_path)), Rows(), Shape(4, 4, is_gray=True))
    assert read.images[:, 0, 0, 0].tolist() == [76, 7, 255]
    deep = Image.fromarray(np.full((5, 6), 4000, np.uint16))
    deep.save(tmp_path / "b" / "x.png")
    with pytest.raises(ArtifactError, match=r"b/x\.png.*mode I;16.*scale it to 8 bits"):
        read_images(open_source(str(tmp_path)), Rows(), Shape(4, 4, is_gray=True))


def test_a_gray_network_is_searched_saved_exported_and_trained(settings, tmp_path):
    config = load_config(RunConfig, settings)
    setup = Setup.create(config).prepare()
    assert setup.plan.input_shape == (1, HEIGHT, WIDTH)
    scorer = make_scorer(**scorer_arguments(setup))
    loop = SearchLoop(
        LocalEvaluator(scorer), setup.plan.cost_model, RunDirectory(tmp_path),
        rates=config.rates, evaluations=config.evaluations, mode="rounds",
    )  # fmt: skip
    loop.run(make_run_strategy(setup))
    searched = {rate: loop.archive.best(rate) for rate in config.rates}
    (row,) = build_winners(setup, searched, tmp_path, build_here(setup))
    folder = tmp_path / row["path"]
    description = read_description(folder)
    assert description["input_shape"] == [1, HEIGHT, WIDTH]
    assert (description["mean"], description["std"]) == (SCALE["mean"], SCALE["std"])
    subnet = load_subnet(folder)
    measured = measure_split(subnet, setup.search)
    assert measured.top1 == pytest.approx(description["search"]["score"], abs=0.02)
    exported = export_subnet(folder, "state-dict")
    assert exported.max_error < 1e-5
    recipe = Recipe(epochs=3, batch_size=16, lr=0.05, padding=1)
    train(subnet, make_batches(Splits(config.data).read("train"), recipe), setup.search, recipe)
    assert measure_split(subnet, setup.search).loss < measured.loss


def test_a_network_is_trained_on_gray_images(settings, tmp_path):
    values = {"name": "base", "model": {"name": f"{__name__}:make_gray"}, "data": settings["data"]}
    recipe = {"epochs": 1, "batch_size": 32, "padding": 1}
    train_model(load_config(TrainConfig, values | {"training": recipe}), tmp_path / "base")
    assert json.loads((tmp_path / "base" / "result.json").read_text())["test"]["images"] == 64


@pytest.mark.parametrize(
    ("channels", "numbers", "message"),
    [
        (1, 3, r"takes 1 channel, and images have 3 by .*: give them one number each"),
        (3, 1, r"takes 3 channels, and images have 1 by .*: give them three numbers each"),
        (4, 1, r"takes 4 channels, .* a task of your own \(docs/tasks.md\)"),
    ],
)
def test_a_first_layer_of_other_channels_is_one_line(
    settings, channels, numbers, message, tmp_path
):
    scale = {"mean": [0.5] * numbers, "std": [0.2] * numbers}
    file = tmp_path / "w.safetensors"
    save_file(make_gray(channels).state_dict(), file)
    model = {"name": f"{__name__}:make_gray", "kwargs": {"channels": channels}}
    values = {"model": model | {"weights": str(file)}, "data": settings["data"] | scale}
    with pytest.raises(ConfigError, match=message) as caught:
        Setup.create(load_config(RunConfig, settings | values))
    assert "\n" not in str(caught.value)
    alone = {"name": "base", "model": model, "data": values["data"]}
    with pytest.raises(ConfigError, match=message):
        train_model(load_config(TrainConfig, alone), tmp_path / "base")
    assert not (tmp_path / "base").exists()


def test_a_network_with_another_fault_is_left_to_its_plan():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(3, 2))
    assert find_channels(net, torch.zeros(1, 1, 8, 8)) is None
    check_channels(net, torch.zeros(1, 3, 8, 8))


def test_a_gray_network_by_name_is_analysed_on_one_channel():
    assert "input 1x16x16" in inspect_model(f"{__name__}:make_gray", side=16).about


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mean": [0.5, 0.5], "std": [0.2, 0.2]}, r"data\.mean: 2 numbers.*task of your own"),
        ({"mean": [], "std": [0.2]}, r"data\.mean: 0 numbers"),
        ({"mean": [0.5] * 4, "std": [0.2] * 4}, r"data\.mean: 4 numbers.*docs/tasks.md"),
        ({"mean": [0.5], "std": [0.0]}, r"data\.std\.0: .*greater than 0"),
        ({"mean": [0.5], "std": [0.2] * 3}, r"data\.mean has 1 and data\.std 3 .*task of your own"),
        ({"mean": [0.5]}, r"data\.mean has 1 and data\.std 3"),  # the sample's deviation
    ],
)
def test_other_numbers_of_channels_are_refused_in_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        find_normalisation(load_config(RunConfig, {"data": values}).data)
    assert "\n" not in str(caught.value)


def test_colours_are_read_bit_for_bit_as_before_there_was_gray():
    def sha256(array):
        return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]

    split = Splits(DataConfig()).read("search", 50)
    generator = torch.Generator().manual_seed(0)
    crops = augment(split.images, split.mean, split.std, generator)
    assert sha256(split.images) == "36934bce1db953b6"
    assert sha256(split.tensors()[0].numpy()) == "bb1b2b7f4db80c06"
    assert sha256(crops.numpy()) == "efcc95341481bf2f"
