"""Files of weights as people save them load, and say what was taken and stripped."""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cacp_ray.errors import ArtifactError
from cacp_ray.models.factory import build_model
from cacp_ray.models.pretrained import load_weights


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    return build_model("resnet20", 10)


def states(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def prefixed(model, prefix, **more):
    return {f"{prefix}{name}": value for name, value in states(model).items()} | more


AVERAGE = {name: torch.zeros(1) for name in ("a", "b")}
WRAPPED = {
    "lightning": (lambda m: {"epoch": 3, "state_dict": prefixed(m, "model.")}, "prefix model. of"),
    "a trainer's": (
        lambda m: {"epoch": 3, "model": states(m), "optimizer": {"lr": 1}},
        "under model",
    ),
    "with an average": (lambda m: {"model": states(m), "ema": AVERAGE}, "it also has ema"),
    "named": (lambda m: {"model_state_dict": states(m), "loss": 0.1}, "under model_state_dict"),
    "an average alone": (lambda m: {"ema": states(m), "step": 9}, "under ema"),
    "parallel": (lambda m: nn.DataParallel(m).state_dict(), "prefix module. of"),
    "compiled": (lambda m: prefixed(m, "_orig_mod."), "prefix _orig_mod. of"),
    "both": (lambda m: {"net": prefixed(m, "module._orig_mod.")}, "prefix module._orig_mod. of"),
    "a backbone": (
        lambda m: prefixed(m, "backbone.", **{"neck.weight": torch.zeros(2)}),
        "is taken off; other names, left out: 1",
    ),
}


@pytest.mark.parametrize("case", WRAPPED)
def test_what_people_save_loads_and_says_what_was_taken(case, trained, tmp_path, caplog):
    make, message = WRAPPED[case]
    file = tmp_path / "last.pth"
    torch.save(make(trained), file)
    model = build_model("resnet20", 10)
    with caplog.at_level(logging.INFO, logger="cacp_ray"):
        load_weights(model, str(file))
    assert message in caplog.text
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained.state_dict()[name]), name


def test_prefixes_of_a_safetensors_file(trained, tmp_path):
    save_file(prefixed(trained, "module."), tmp_path / "w.safetensors")
    load_weights(build_model("resnet20", 10), str(tmp_path / "w.safetensors"))


def test_a_plain_state_dict_is_loaded_without_a_word(trained, tmp_path, caplog):
    torch.save(states(trained), tmp_path / "w.pth")
    with caplog.at_level(logging.INFO, logger="cacp_ray"):
        load_weights(build_model("resnet20", 10), str(tmp_path / "w.pth"))
    assert not caplog.text


class Trap:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_file_of_weights_runs_no_code(trained, tmp_path):
    trap = tmp_path / "sprung"
    torch.save(states(trained) | {"extra": Trap(trap)}, tmp_path / "w.pth")
    with pytest.raises(ArtifactError, match="not a readable state dict"):
        load_weights(build_model("resnet20", 10), str(tmp_path / "w.pth"))
    assert not trap.exists()


REFUSED = {
    "two that fit": (lambda m: prefixed(m, "student.") | prefixed(m, "teacher."), "missing"),
    "a whole network": (lambda m: m, "without other Python objects"),
    "no tensors": (lambda m: {"epoch": 3, "lr": 0.1}, "holds no state dict .it has epoch, lr"),
    "a list": (lambda m: [1, 2], "holds no state dict .it has list"),
    "another network": (lambda m: prefixed(build_model("resnet32", 10), "module."), "do not fit"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_one_line(case, trained, tmp_path):
    make, message = REFUSED[case]
    file = tmp_path / "last.pth"
    torch.save(make(trained), file)
    with pytest.raises(ArtifactError, match=message) as caught:
        load_weights(build_model("resnet20", 10), str(file))
    assert "\n" not in str(caught.value)
