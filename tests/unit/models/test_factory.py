"""Networks by name, and weights that fit or are refused with the keys."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cacp_ray.data.images import read_parquet
from cacp_ray.errors import ArtifactError, ConfigError, UnsupportedModelError
from cacp_ray.models.factory import CIFAR_MODELS, build_model, load_weights
from cacp_ray.training.metrics import measure


@pytest.mark.parametrize("name", [n for n in CIFAR_MODELS if n != "resnet110"])
def test_cifar_models_map_images_to_classes(name):
    model = build_model(name, 7).eval()
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_parameter_names_are_torchvisions():
    names = set(build_model("resnet20", 10).state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer2.0.downsample.1.bias", "fc.bias"} <= names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet21", "did you mean .*resnet20"),
        ("torchvision:resnet51", "did you mean .*resnet50"),
        ("no_such_package:net", "cannot be imported"),
        ("math:cosine", "cannot be imported"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, 10)


def test_a_factory_must_return_a_module():
    with pytest.raises(UnsupportedModelError, match="must return a torch"):
        build_model("builtins:dict", 10)


def test_embedded_weights_reach_their_accuracy():
    # 90.7 % on the whole search split; three standard errors of 500 images are 3.9 points.
    model = build_model("resnet20", 10)
    load_weights(model, "embedded:resnet20_cifar10")
    split = read_parquet("embedded:search").take(500)
    found = measure(model, *split.tensors())
    assert found.top1 > 0.907 - 0.039


def test_weights_that_do_not_fit_are_refused_with_the_keys(tmp_path):
    file = str(tmp_path / "w.safetensors")
    save_file(build_model("resnet32", 10).state_dict(), file)
    with pytest.raises(ArtifactError, match=r"unexpected layer1\.3\.bn1\.bias"):
        load_weights(build_model("resnet20", 10), file)
    save_file(build_model("resnet20", 10).state_dict(), file)
    with pytest.raises(ArtifactError, match=r"fc\.bias has shape \(10,\), the model \(100,\)"):
        load_weights(build_model("resnet20", 100), file)
    load_weights(build_model("resnet20", 10), file)


def test_weights_with_nan_missing_or_cut_short_are_refused(tmp_path):
    file = tmp_path / "w.safetensors"
    net = build_model("resnet20", 10)
    with torch.no_grad():
        net.get_parameter("fc.bias")[0] = float("nan")
    save_file(net.state_dict(), file)
    with pytest.raises(ArtifactError, match=r"fc\.bias holds NaN"):
        load_weights(build_model("resnet20", 10), str(file))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_weights(net, str(file))
    with pytest.raises(ArtifactError, match="no such file"):
        load_weights(nn.Identity(), str(tmp_path / "none"))
