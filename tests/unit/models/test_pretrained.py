"""Published weights have transforms without a network, and their tensors come from the cache."""

import dataclasses
import logging
import re
import time
from hashlib import sha256

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import ModelConfig, RunConfig
from cacp_ray.data.images import read_parquet
from cacp_ray.data.transforms import to_normalized
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.models import pretrained
from cacp_ray.models.pretrained import describe_weights, is_published, read_weights
from cacp_ray.workflows.network import describe_published, load_model
from cacp_ray.workflows.splits import Splits, find_normalisation

RESNET18 = ModelConfig(name="torchvision:resnet18", weights="IMAGENET1K_V1")


EFFICIENTNET = {"model": {"name": "torchvision:efficientnet_b0", "weights": "IMAGENET1K_V1"}}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url, file, hash_prefix, progress):
        assert url.endswith(f"-{hash_prefix}.pth")
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_bring_their_transforms_and_accuracy():
    published = describe_weights("torchvision:resnet50", "IMAGENET1K_V2")
    assert (published.num_classes, published.data) == (1000, "ImageNet-1K")
    assert published.top1 == pytest.approx(0.80858)
    config = load_config(
        RunConfig,
        {
            "model": {"name": "torchvision:resnet50", "weights": "IMAGENET1K_V2"},
            "data": {"resize": 256},
        },
    )
    assert (config.data.resize, config.data.crop) == (256, 224)
    assert config.data.mean == pytest.approx((0.485, 0.456, 0.406))
    timm = describe_weights("timm:resnet18", "pretrained")
    assert (timm.transforms["crop"], timm.num_classes) == (224, 1000)


@pytest.mark.parametrize(
    ("name", "weights", "expected"),
    [
        ("torchvision:resnet50", "IMAGENET1K_V2", True),
        ("torchvision:resnet50", "mine.safetensors", False),
        ("torchvision:resnet50", "mine.pth", False),
        ("timm:resnet18", "pretrained", True),
        ("resnet20", "embedded:resnet20_cifar10", False),
        ("torchvision:resnet50", None, False),
    ],
)
def test_names_are_told_from_files(name, weights, expected):
    assert is_published(name, weights) == expected


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"did you mean .*IMAGENET1K_V2"):
        load_config(
            RunConfig, {"model": {"name": "torchvision:resnet50", "weights": "IMAGENET1K_V3"}}
        )
    with pytest.raises(ConfigError, match="write pretrained"):
        describe_weights("timm:resnet18", "IMAGENET1K_V1")


@pytest.fixture
def large_image(tmp_path):
    """An enlarged photograph of the sample, in a folder of its class."""
    image = Image.fromarray(read_parquet("embedded:train", (0, 1)).images[0])
    image = image.resize((400, 300), Image.Resampling.BICUBIC)
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    image.save(tmp_path / "photos" / "cat" / "one.png")
    return image


@pytest.mark.parametrize("stream", [False, True])
def test_images_are_those_of_the_weights_own_transforms(tmp_path, large_image, stream):
    split = {"path": str(tmp_path / "photos")}
    given = EFFICIENTNET | {"data": {"train": split, "search": split, "stream": stream}}
    data = load_config(RunConfig, given).data
    assert data.interpolation == "bicubic"
    expected = models.EfficientNet_B0_Weights.IMAGENET1K_V1.transforms()(large_image)
    sets = [Splits(data).open("train").at(np.arange(1)), Splits(data).read("search")]
    for images in sets:
        normalised = to_normalized(images.images, images.mean, images.std)[0]
        assert torch.allclose(normalised, expected, atol=1e-5)
    bilinear = Splits(data.model_copy(update={"interpolation": "bilinear"})).read("search")
    assert not np.array_equal(bilinear.images, sets[0].images)


def test_interpolation_is_that_of_the_weights_unless_it_is_set():
    own = {"torchvision:resnet50": "bilinear", "torchvision:maxvit_t": "bicubic"}
    for name, expected in own.items():
        transforms = describe_weights(name, "IMAGENET1K_V1").transforms
        assert transforms["interpolation"] == expected
    for name, expected in {"timm:vgg11": "bilinear", "timm:resnet18": "bicubic"}.items():
        transforms = describe_weights(name, "pretrained").transforms
        assert transforms["interpolation"] == expected
    assert load_config(RunConfig, {}).data.interpolation == "bilinear"
    set_here = load_config(RunConfig, EFFICIENTNET, ["data.interpolation=bilinear"])
    assert set_here.data.interpolation == "bilinear"
    with pytest.raises(ConfigError, match=r"data\.interpolation: .*'bilinear' or 'bicubic'"):
        load_config(RunConfig, {}, ["data.interpolation=area"])


def test_the_published_accuracy_is_told():
    resnet = ModelConfig(name="torchvision:resnet50", weights="IMAGENET1K_V2")
    assert describe_published(resnet) == "; published top-1 80.86 % on ImageNet-1K"
    for name, weights in (("timm:resnet18", "pretrained"), ("resnet20", "x.safetensors")):
        assert describe_published(ModelConfig(name=name, weights=weights)) == ""


def test_weights_without_a_classifier_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"hold no classifier: give IMAGENET1K_V1$"):
        describe_weights("torchvision:vgg16", "IMAGENET1K_FEATURES")
    with pytest.raises(ConfigError, match="are published without a classifier"):
        describe_weights("timm:vit_small_patch14_dinov2", "pretrained")


@pytest.mark.parametrize(
    ("name", "weights", "data", "is_refused"),
    [
        ("torchvision:resnet18", "mine.pth", {"train": {"path": "mine"}}, "data.mean and std"),
        ("resnet20", "mine.pth", {"train": {"path": "mine"}, "mean": (0, 0, 0)}, "data.std not"),
        ("resnet20", "mine.pth", {"search": {"path": "mine"}}, "data.mean and std"),
        ("torchvision:resnet18", "mine.pth", {}, ""),  # the sample is CIFAR-10
        ("torchvision:resnet18", "IMAGENET1K_V1", {"train": {"path": "mine"}}, ""),
    ],
)
def test_data_of_ones_own_needs_the_mean_and_std_of_its_training(name, weights, data, is_refused):
    given = {"model": {"name": name, "weights": weights}, "data": data}
    if is_refused:
        with pytest.raises(ConfigError, match=is_refused):
            find_normalisation(load_config(RunConfig, given).data)
    else:
        find_normalisation(load_config(RunConfig, given).data)
    both = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}
    own = load_config(RunConfig, given | {"data": data | both})
    assert find_normalisation(own.data) == tuple(both.values())


def test_all_files_of_torchvision_are_named_by_their_hash():
    names = models.list_models(module=models)
    urls = [weights.url for name in names for weights in models.get_model_weights(name)]
    assert [url for url in urls if not re.search(r"-[0-9a-f]{8,}\.pth$", url)] == []


def name_by_hash(monkeypatch, file):
    """Makes a file pass for the one that torchvision publishes."""
    named = file.with_name(f"resnet18-{sha256(file.read_bytes()).hexdigest()[:8]}.pth")
    file.rename(named)
    weights = models.ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(weights, "url", f"https://somewhere/{named.name}")
    return named


def test_weights_are_read_from_the_cache(cache, monkeypatch):
    torch.manual_seed(0)
    reference = models.resnet18().eval()
    torch.save(reference.state_dict(), cache / "mine.pth")
    file = name_by_hash(monkeypatch, cache / "mine.pth")
    model = load_model(RESNET18, 1000)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    # The path of a user's own file works too.
    own = ModelConfig(name="torchvision:resnet18", weights=str(file))
    assert torch.equal(load_model(own, 1000)(x), reference(x))
    # A file that was cut short is refused and left in place.
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ArtifactError, match="delete the file") as caught:
        load_model(RESNET18, 1000)
    assert str(file) in str(caught.value)
    assert file.exists()


def test_a_download_that_is_cut_short_is_not_kept(cache, monkeypatch):
    def cut(url, file, hash_prefix, progress):
        raise RuntimeError(f'invalid hash value (expected "{hash_prefix}", got "0")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", cut)
    with pytest.raises(ArtifactError, match=r"cannot be fetched .*invalid hash"):
        load_model(RESNET18, 1000)


def test_weights_that_are_not_there_say_where_they_belong(cache):
    with pytest.raises(ArtifactError, match="no network here") as caught:
        load_model(RESNET18, 1000)
    assert str(cache / "resnet18-f37072fd.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_state_dict_is_refused(tmp_path):
    file = tmp_path / "mine.pth"
    own = ModelConfig(name="torchvision:resnet18", weights=str(file))
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable state dict"):
        load_model(own, 1000)
    torch.save([1, 2], file)
    with pytest.raises(ArtifactError, match="holds no state dict"):
        load_model(own, 1000)
    torch.save(models.resnet18(num_classes=5).state_dict(), file)
    with pytest.raises(ArtifactError, match="do not fit the model"):
        load_model(own, 1000)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty cache of the Hugging Face hub, and no connection to the hub."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    return tmp_path / "models--timm--resnet18.a1_in1k"


def test_weights_published_for_squashed_images_are_warned_of(hub, caplog, monkeypatch):
    squashed = dataclasses.replace(timm.get_pretrained_cfg("resnet18"), crop_mode="squash")
    monkeypatch.setattr(timm, "get_pretrained_cfg", lambda _: squashed)
    with pytest.raises(ArtifactError):
        read_weights("timm:resnet18", "pretrained")
    assert [record.getMessage() for record in caplog.records] == [
        "timm:resnet18 was published for images prepared otherwise (crop mode squash); here they "
        "are cropped in the middle, so its accuracy will differ"
    ]


def test_timm_weights_in_the_cache_need_no_network(hub):
    reference = timm.create_model("resnet18").eval()
    folder = hub / "snapshots" / "abc"
    folder.mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    save_file(reference.state_dict(), folder / "model.safetensors")
    weights = read_weights("timm:resnet18", "pretrained")
    assert all(torch.equal(weights[key], value) for key, value in reference.state_dict().items())


def test_timm_weights_that_cannot_be_fetched_fail_fast_and_quietly(hub, caplog, capfd):
    started = time.monotonic()
    with caplog.at_level(logging.INFO), pytest.raises(ArtifactError) as e:
        read_weights("timm:resnet18", "pretrained")
    assert "\n" not in str(e.value)
    assert "timm/resnet18.a1_in1k) are not in the Hugging Face cache and cannot" in str(e.value)
    assert time.monotonic() - started < 2 + pretrained.HUB_SECONDS
    assert not caplog.records
    assert capfd.readouterr() == ("", "")
