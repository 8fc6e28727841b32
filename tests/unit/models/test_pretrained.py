"""Published weights: their transforms without a network, their tensors from the cache."""

import pytest
import torch
from torchvision import models

from cacp_ray.config import ModelConfig, RunConfig, load_config
from cacp_ray.errors import ArtifactError, ConfigError
from cacp_ray.loading import load_model
from cacp_ray.models.pretrained import describe_weights, is_published

RESNET18 = ModelConfig(name="torchvision:resnet18", weights="IMAGENET1K_V1")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def refuse(url, *arguments, **options):
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def test_weights_bring_their_transforms_and_accuracy():
    found = describe_weights("torchvision:resnet50", "IMAGENET1K_V2")
    assert (found.num_classes, found.data) == (1000, "ImageNet-1K")
    assert found.top1 == pytest.approx(0.80858)
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


def test_weights_are_read_from_the_cache(cache):
    torch.manual_seed(0)
    reference = models.resnet18().eval()
    torch.save(reference.state_dict(), cache / "resnet18-f37072fd.pth")
    model = load_model(RESNET18, 1000)
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), reference(x))
    # A file of one's own, by its path.
    own = ModelConfig(name="torchvision:resnet18", weights=str(cache / "resnet18-f37072fd.pth"))
    assert torch.equal(load_model(own, 1000)(x), reference(x))


def test_weights_that_are_not_there_say_where_they_belong(cache):
    with pytest.raises(ArtifactError, match="no network here") as caught:
        load_model(RESNET18, 1000)
    assert str(cache / "resnet18-f37072fd.pth") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_state_dict_is_refused(cache):
    file = cache / "resnet18-f37072fd.pth"
    file.write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="not a readable state dict"):
        load_model(RESNET18, 1000)
    torch.save([1, 2], file)
    with pytest.raises(ArtifactError, match="holds no state dict"):
        load_model(RESNET18, 1000)
    torch.save(models.resnet18(num_classes=5).state_dict(), file)
    with pytest.raises(ArtifactError, match="do not fit the model"):
        load_model(RESNET18, 1000)
