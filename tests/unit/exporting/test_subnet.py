"""An exported file computes what the subnet computes, for any batch size, or does not exist."""

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError, UnsupportedModelError
from cacp_ray.exporting import formats
from cacp_ray.exporting.formats import FORMATS
from cacp_ray.exporting.subnet import compare, export_subnet
from cacp_ray.pruning.arguments import Argument
from cacp_ray.pruning.subnet import load_subnet
from tests.small import mostly_slow
from tests.unit.exporting.folders import BESSEL, DEPTHWISE, PER_IMAGE, make_folder

NETWORKS = {
    "resnet20": ("resnet20", 32),
    "depthwise": (DEPTHWISE, 8),
    "mobilenet": ("torchvision:mobilenet_v2", 64),
    "tied": ("tests.unit.pruning.couplings:tied_weights", 8),
}


@pytest.fixture(scope="module", params=mostly_slow(NETWORKS, ("resnet20", "depthwise", "tied")))
def network(request, tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("subnet"), *NETWORKS[request.param])


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "rate-0.50", DEPTHWISE, 8)


FLOATS = [name for name, kind in FORMATS.items() if not kind.is_int8]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_file(path: Path, folder: Path, images: torch.Tensor) -> torch.Tensor:
    """Outputs of a program that knows only the file format."""
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(path)
        (logits,) = session.run(None, {"image": images.numpy()})
        return torch.from_numpy(np.asarray(logits))
    if path.suffix == ".xml":
        exact = {"INFERENCE_PRECISION_HINT": "f32"}  # else bfloat16 where the processor has it
        compiled = openvino.Core().compile_model(path, "CPU", exact)
        return torch.from_numpy(compiled(images.numpy())[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(images)
    net = load_subnet(folder, finetuned=False)
    with torch.no_grad():
        for tensor in net.parameters():
            tensor.fill_(torch.nan)
    net.load_state_dict(load_file(path), strict=True)
    return net(images)


@pytest.mark.parametrize("format", FLOATS)
def test_the_file_computes_what_the_subnet_computes_for_any_batch(network, format):
    before = names(network)
    done = export_subnet(network, format)
    files = [done.path, *([done.path.with_suffix(".bin")] if format == "openvino" else [])]
    assert names(network) == sorted([*before, *(file.name for file in files)])
    net = load_subnet(network)
    shape = json.loads((network / "subnet.json").read_text())["input_shape"]
    for size in (1, 2, 5):
        images = torch.randn(size, *shape)
        with torch.no_grad():
            expected, got = net(images), run_file(done.path, network, images)
        assert got.shape == expected.shape
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    content = b"".join(file.read_bytes() for file in files)
    assert done.size == len(content)
    assert b"site-packages" not in content  # no paths of this machine
    assert str(Path.cwd()).encode() not in content


def test_the_weights_are_the_finetuned_ones_where_there_are_some(folder):
    tensors = load_file(folder / "model.safetensors")
    tuned = {name: value + 1 for name, value in tensors.items()}
    assert not export_subnet(folder, "state-dict").finetuned
    save_file(tuned, folder / "finetuned.safetensors")
    for finetuned, expected, word in ((None, tuned, "finetuned"), (False, tensors, "search")):
        path = folder / f"{word}-out.safetensors"
        done = export_subnet(folder, "state-dict", out=path, finetuned=finetuned)
        assert done.finetuned == (word == "finetuned")
        written = load_file(path)
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], expected[name]) for name in expected)
        with safe_open(path, "pt") as file:
            assert json.loads(file.metadata()["cacp_ray"])["weights"] == word


def test_a_runtime_that_answers_otherwise_is_an_error_and_no_file_is_left(folder, monkeypatch):
    answer = onnxruntime.InferenceSession.run

    def wrong(self, *arguments):
        return [logits * 1.001 for logits in answer(self, *arguments)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", wrong)
    before = names(folder)
    with pytest.raises(EvaluationError, match=r"differs .* by 1\.0e-03"):
        export_subnet(folder, "onnx")
    assert names(folder) == before


def test_a_runtime_that_fails_is_an_error_and_no_file_is_left(folder, monkeypatch):
    def fail(self, *arguments):
        raise RuntimeError("NOT_IMPLEMENTED : Conv(11)\nof float64")

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", fail)
    before = names(folder)
    with pytest.raises(EvaluationError, match=r"does not run here .*NOT_IMPL.*no file") as caught:
        export_subnet(folder, "onnx")
    assert "\n" not in str(caught.value)
    assert names(folder) == before


@pytest.mark.parametrize("scale", [1.0, 1e-9])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda logits: logits * torch.nan, "differs"),
        (lambda logits: logits + 2e-4 * logits.abs().max(), "differs"),
        (lambda logits: logits[:1], "returns"),
        (lambda logits: logits[:, :-1], "returns"),
    ],
)
def test_the_tolerance_is_a_share_of_the_largest_output(scale, spoil, message):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 4)).requires_grad_(False)
    net[1].weight *= scale
    net[1].bias *= scale
    arguments = (Argument(None, (3, 2, 2)),)
    assert compare(net, lambda images: net(images) * (1 + 5e-5), arguments) < 1e-4
    with pytest.raises(EvaluationError, match=message):
        compare(net, lambda images: spoil(net(images)), arguments)


def test_a_network_of_one_batch_size_is_refused_and_no_file_is_left(tmp_path):
    folder = make_folder(tmp_path / "x", PER_IMAGE, 8)
    before = names(folder)
    with pytest.raises(UnsupportedModelError, match="for any batch size") as caught:
        export_subnet(folder, "torch-export")
    assert "\n" not in str(caught.value)
    assert names(folder) == before


def test_an_operator_without_a_translation_is_named_with_its_layer(tmp_path):
    folder = make_folder(tmp_path / "x", BESSEL, 8)
    with pytest.raises(UnsupportedModelError) as caught:
        export_subnet(folder, "onnx")
    assert "no translation of bessel_j0, in layer 1 (Bessel): write that" in str(caught.value)


@pytest.mark.parametrize("format", FLOATS)
def test_an_existing_file_is_left_alone(folder, format):
    path = folder / f"subnet{FORMATS[format].suffix}"
    path.write_text("mine")
    with pytest.raises(ArtifactError, match="exists: delete it"):
        export_subnet(folder, format)
    assert path.read_text() == "mine"


def test_missing_packages_are_named_with_the_command_that_installs_them(folder, monkeypatch):
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs onnx, .*pip install 'cacp-ray\[export\]'"):
        export_subnet(folder, "onnx")
    assert export_subnet(folder, "torch-export").path.exists()  # this format needs no other package


def test_a_folder_that_cannot_be_written_is_bad_input(folder):
    blocker = folder / "file"
    blocker.write_text("")
    with pytest.raises(ArtifactError, match="cannot be written"):
        export_subnet(folder, "state-dict", out=blocker / "net.safetensors")


def test_an_input_of_another_size_names_the_file(folder):
    file = folder / "subnet.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"input_shape": [1, 8, 8]}))
    with pytest.raises(ArtifactError, match=r"subnet.json: the network does not run on its input"):
        export_subnet(folder, "state-dict")


def test_a_path_that_is_no_text_is_written(folder):
    out = folder / "\udcff.safetensors"  # a byte that is no UTF-8
    assert export_subnet(folder, "state-dict", out=out).path.stat().st_size > 0


def test_a_broken_folder_is_refused(folder):
    shutil.copy(folder / "README.md", folder / "model.safetensors")
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        export_subnet(folder, "torch-export")
    with pytest.raises(ArtifactError, match=r"subnet\.json"):
        export_subnet(folder / "none", "torch-export")
