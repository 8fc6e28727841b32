"""Networks are built by name, and weights that do not fit are refused with their keys."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models

from cacp_ray.data.images import read_parquet
from cacp_ray.errors import ArtifactError, CacpError, ConfigError
from cacp_ray.models.factory import (
    CIFAR_MODELS,
    build_model,
    default_input_shape,
    default_num_classes,
    find_function,
)
from cacp_ray.models.pretrained import load_weights
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
        ("math:pi", "is a float, not a function"),
        ("torchvision:", "write torchvision:NAME"),
        ("timm:", "write timm:NAME"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(name, message):
    with pytest.raises(ConfigError, match=message):
        build_model(name, 10)


@pytest.mark.parametrize(
    ("function", "message"),
    [("dict", "must return a torch"), ("bytes", "cannot be built"), ("no_such", "cannot be impo")],
)
def test_a_factory_that_fails_says_so_in_one_line(function, message):
    with pytest.raises(CacpError, match=message) as caught:
        build_model(f"builtins:{function}", 10)
    assert "\n" not in str(caught.value)


def test_a_module_that_fails_on_import_is_bad_input(tmp_path, monkeypatch):
    (tmp_path / "broken_models.py").write_text("def net(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match="SyntaxError"):
        build_model("broken_models:net", 10)


def test_networks_are_inspected_at_the_input_they_are_made_for():
    timm = build_model("timm:test_byobnet", 10)
    assert default_input_shape("timm:test_byobnet", timm) == (3, 160, 160)
    assert default_input_shape("torchvision:inception_v3", nn.Identity()) == (3, 299, 299)
    assert default_input_shape("torchvision:resnet18", nn.Identity()) == (3, 224, 224)
    assert default_input_shape("resnet20", nn.Identity()) == (3, 32, 32)
    names = ("torchvision:resnet18", "timm:test_byobnet", "resnet20", "my.package:net")
    assert [default_num_classes(name) for name in names] == [1000, 1000, 10, 10]


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_auxiliary_heads_are_left_out_and_their_weights_are_ignored(name, tmp_path):
    # Published weights hold the heads that only training runs.
    source = models.get_model(name, aux_logits=True, init_weights=False, num_classes=7).eval()
    file = str(tmp_path / "w.safetensors")
    save_file(source.state_dict(), file)
    model = build_model(f"torchvision:{name}", 7)
    assert not any(key.lower().startswith("aux") for key in model.state_dict())
    load_weights(model, file)
    x = torch.randn(1, 3, 75, 75)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), source(x))
    assert isinstance(model.train()(x.repeat(2, 1, 1, 1)), torch.Tensor)  # it can be trained
    save_file(source.state_dict() | {"head3.weight": torch.zeros(1)}, file)
    with pytest.raises(ArtifactError, match=r"unexpected head3\.weight;"):
        load_weights(model, file)


def test_embedded_weights_reach_their_accuracy():
    # 90.7 % on the whole search split; three standard errors of 500 images are 3.9 points.
    model = build_model("resnet20", 10)
    load_weights(model, "embedded:resnet20_cifar10")
    split = read_parquet("embedded:search").take(500)
    accuracy = measure(model, *split.tensors())
    assert accuracy.top1 > 0.907 - 0.039


def test_weights_that_do_not_fit_are_refused_with_the_keys(tmp_path):
    file = str(tmp_path / "w.safetensors")
    save_file(build_model("resnet32", 10).state_dict(), file)
    with pytest.raises(ArtifactError, match=r"unexpected layer1\.3\.bn1\.bias"):
        load_weights(build_model("resnet20", 10), file)
    save_file(build_model("resnet20", 10).state_dict(), file)
    with pytest.raises(ArtifactError, match=r"fc\.bias has shape \(10,\), the model \(100,\)"):
        load_weights(build_model("resnet20", 100), file)
    load_weights(build_model("resnet20", 10), file)


@pytest.mark.parametrize(
    ("given", "classes", "model"),
    [("resnet20_padding", 10, "resnet20"), ("resnet20", 10, "resnet20_padding"),
     ("resnet56_padding", 100, "resnet56"), ("vgg16", 7, "vgg16")],
)  # fmt: skip
def test_weights_of_another_network_of_ours_are_named(given, classes, model, tmp_path):
    state = build_model(given, classes).state_dict()
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match=f"they are of {given} with {classes} classes"):
        load_weights(build_model(model, 10), str(tmp_path / "w.safetensors"))


def test_weights_of_no_network_of_ours_are_refused_with_their_keys(tmp_path):
    save_file({"logit_scale": torch.tensor(1.0)}, tmp_path / "w.safetensors")
    with pytest.raises(ArtifactError, match="more; check the model name and the number of classes"):
        load_weights(build_model("resnet20", 10), str(tmp_path / "w.safetensors"))


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


def wide(width=24, *, depth=2):
    return nn.Conv2d(width, depth, 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{__name__}:wide", r"'widht'.*: it takes \(width, depth\); see model\.kwargs"),
        ("resnet20", r"'widht'.*: it takes \(num_classes.*\); see model\.kwargs"),
        ("torchvision:resnet18", r"'widht'.*: it was given \(.*widht=3\)"),
    ],
)
def test_a_wrong_argument_is_refused_with_those_that_the_network_takes(name, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(name, None, {"widht": 3})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        (
            "task",
            "mytask",
            r"task 'mytask' cannot be imported: write package\.module:Class$",
        ),
        ("task", ":Task", r"write package\.module:Class$"),
        ("train", "mytask:", r"write package\.module:function$"),
        ("task", "math:pi", "is a float, not a class or a function without arguments"),
        ("task", "no_such_package:Task", r"write package\.module:Class; the package must"),
    ],
)
def test_a_name_of_the_users_own_is_refused_with_its_form(kind, name, message):
    with pytest.raises(ConfigError, match=message):
        find_function(kind, name)
