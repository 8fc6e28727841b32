"""Networks with several inputs and outputs are exported under their own names and structure."""

import json
import re
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch.utils._pytree import tree_flatten

import cacp_ray
from cacp_ray.cli import main
from cacp_ray.errors import ArtifactError, ConfigError, EvaluationError, UnsupportedModelError
from cacp_ray.exporting.formats import FORMATS
from cacp_ray.exporting.subnet import compare
from cacp_ray.pruning.arguments import Argument, describe_inputs, make_inputs, read_arguments
from cacp_ray.pruning.inputs import call, check_inputs, tensors_of
from tests.small import mostly_slow
from tests.unit.exporting.several import CASES, Dataclasses, Segmenter, Siamese, Unknown, image


def save(net, inputs, folder: Path) -> Path:
    plan = cacp_ray.analyze(net, inputs)
    return plan.save(plan.build(plan.uniform(0.5)), folder)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    make, inputs, *names = CASES[request.param]
    torch.manual_seed(0)
    net = make().eval()
    folder = save(net, inputs, tmp_path_factory.mktemp("several") / "rate-0.50")
    return net, folder, names


@pytest.mark.parametrize(
    "format",
    mostly_slow(
        [name for name, kind in FORMATS.items() if not kind.is_int8],
        ("onnx", "torch-export", "state-dict"),
    ),
)
def test_the_file_takes_and_returns_what_the_network_does(case, format):
    whole, folder, (ins, outs) = case
    done = cacp_ray.export(folder, format, model=whole)
    net = cacp_ray.load_subnet(folder, model=whole)
    arguments = read_arguments(json.loads((folder / "subnet.json").read_text()))
    assert done.batch_sizes == ((1, 3) if arguments[0].is_batch else ())
    for size in (1, 2, 5):
        inputs = make_inputs(arguments, size, torch.Generator().manual_seed(size))
        with torch.no_grad():
            expected, structure = tree_flatten(call(net, inputs))
        expected = [value for value in expected if value is not None]
        if format == "openvino":
            got = tensors_of(FORMATS[format].read(done.path, net)(inputs))
        elif format == "onnx":
            session = onnxruntime.InferenceSession(done.path)
            assert [value.name for value in session.get_inputs()] == ins
            assert [value.name for value in session.get_outputs()] == outs
            values = [inputs] if isinstance(inputs, torch.Tensor) else inputs
            values = values.values() if isinstance(values, dict) else values
            feed = {name: value.numpy() for name, value in zip(ins, values, strict=True)}
            got = [torch.as_tensor(value) for value in session.run(None, feed)]
        elif format == "torch-export":
            got, read = tree_flatten(call(torch.export.load(done.path).module(), inputs))
            assert read == structure
            got = [value for value in got if value is not None]
        else:
            net.load_state_dict(load_file(done.path), strict=True)
            got = [value for value in tree_flatten(call(net, inputs))[0] if value is not None]
        for one, other in zip(got, expected, strict=True):
            assert one.dtype == other.dtype
            torch.testing.assert_close(one, other, rtol=0, atol=1e-5, check_stride=False)


def test_only_more_than_a_plain_tensor_is_described():
    assert describe_inputs(image()) == {}
    assert describe_inputs((image(),)) == {}
    two = {"inputs": [
        {"name": None, "shape": (3, 8, 8), "dtype": "float32", "is_batch": True},
        {"name": None, "shape": (), "dtype": "int64", "is_batch": True},
    ]}  # fmt: skip
    assert describe_inputs(check_inputs((image(), torch.zeros(1, dtype=torch.int64)))) == two
    (entry,) = describe_inputs({"x": image()})["inputs"]
    assert entry["name"] == "x"
    apart = describe_inputs(check_inputs((image(), torch.zeros(4, 6))))["inputs"]
    assert [(entry["shape"], entry["is_batch"]) for entry in apart] == [
        ((1, 3, 8, 8), False), ((4, 6), False),
    ]  # fmt: skip


def test_a_first_input_of_one_number_is_read_again(tmp_path):
    class Scaled(Siamese):
        def forward(self, scale, image):
            return self.embed(image) * scale[:, None]

    net = Scaled().eval()
    folder = save(net, (torch.zeros(1), image()), tmp_path / "half")
    assert cacp_ray.export(folder, "state-dict", model=net).max_error == 0


def test_a_folder_of_an_older_search_says_what_it_lacks(tmp_path):
    net = Siamese().eval()
    folder = save(net, (image(), image()), tmp_path / "half")
    change(folder, inputs=None)
    with pytest.raises(ArtifactError, match="search again if it takes several inputs") as caught:
        cacp_ray.export(folder, "state-dict", model=net)
    assert "\n" not in str(caught.value)


def change(folder: Path, **values) -> None:
    file = folder / "subnet.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


PLAIN = {"name": None, "shape": [3, 8, 8], "dtype": "float32", "is_batch": True}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("left", "inputs: "),
        ([], "inputs: "),
        ([5], r"inputs\.0: "),
        ([PLAIN] * 101, "inputs: "),
        ([PLAIN | {"dtype": "float31"}], r"inputs\.0\.dtype: .*float31"),
        ([PLAIN | {"dtype": "load"}], r"inputs\.0\.dtype: "),
        ([PLAIN | {"dtype": None}], r"inputs\.0: a shape and a dtype go together"),
        ([PLAIN | {"shape": [3, -1]}], r"inputs\.0\.shape\.1: "),
        ([PLAIN | {"shape": [1] * 9}], r"inputs\.0\.shape: "),
        ([PLAIN | {"shape": [2**20, 2**10]}], "an input of 1,073,741,824 values; at most"),
        ([PLAIN | {"shape": [2**15, 2**12]}] * 3, "an input of 402,653,184 values; at most"),
        ([PLAIN | {"is_batch": "no"}], r"inputs\.0\.is_batch: "),
        ([PLAIN | {"name": "left"}] * 2, "names of their own"),
        ([PLAIN | {"name": "left"}, PLAIN], "names of their own"),
        ([PLAIN], r"does not run on its input_shape \(3, 8, 8\)"),
        ([PLAIN, PLAIN, PLAIN], r"does not run on its inputs \(float32 \(3, 8, 8\), "),
        ([PLAIN, {"name": None}], r"argument 2 of the network is no tensor of bool, "),
    ],
)
def test_inputs_that_were_spoiled_are_one_line(inputs, message, tmp_path):
    net = Siamese().eval()
    folder = save(net, (image(), image()), tmp_path / "half")
    change(folder, inputs=inputs)
    with pytest.raises((ArtifactError, ConfigError), match=rf"subnet\.json: .*{message}") as caught:
        cacp_ray.export(folder, "state-dict", model=net)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("inputs", [(image(), [image()]), {"left": image(), "right": None}])
def test_an_argument_that_is_no_tensor_is_refused_by_export_alone(inputs, tmp_path):
    class Optional(Siamese):
        def forward(self, left, right=None):
            return super().forward(left, left if right is None else right[0])

    net = Optional().eval()
    folder = save(net, inputs, tmp_path / "half")
    assert cacp_ray.load_subnet(folder, model=net) is not None
    with pytest.raises(ConfigError, match=r"argument (2|right) of the network is no tensor"):
        cacp_ray.export(folder, "onnx", model=net)


def test_an_output_that_torch_does_not_see_into_is_refused(tmp_path):
    net = Dataclasses(Unknown).eval()
    assert isinstance(net(image()), Unknown)
    plan = cacp_ray.analyze(Dataclasses().eval(), image())
    folder = plan.save(plan.build(plan.uniform(0.5)), tmp_path / "half")
    with pytest.raises(ConfigError, match=r"Unknown without tensors .*register_dataclass"):
        cacp_ray.export(folder, "state-dict", model=net)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out, aux: (out, aux + 1), r"output aux .* differs .* at batch size 1,"),
        (lambda out, aux: (out * 1.001, aux), r"output out .* differs .* by 1\.0e-03"),
        (lambda out, aux: (out, aux[:, :1]), r"output aux of shape \(1, 1, 8\)"),
        (lambda out, aux: (out,), r"returns 1 tensors at batch size 1, the network 2"),
    ],
)
def test_the_output_that_differs_is_named(spoil, message):
    net = Segmenter().eval()
    arguments = (Argument(None, (3, 8, 8)),)
    assert compare(net, net, arguments) == 0
    with pytest.raises(EvaluationError, match=message):
        compare(net, lambda images: spoil(*net(images).values()), arguments)


def make_segmenter() -> Segmenter:
    torch.manual_seed(0)
    return Segmenter().eval()


def make_table():
    torch.manual_seed(0)
    return CASES["no batch"][0]().eval()


@pytest.mark.parametrize(
    ("make", "inputs", "end"),
    [
        ("make_segmenter", image(), "at batch sizes 1 and 3"),
        ("make_table", CASES["no batch"][1], "for inputs of fixed shapes only"),
    ],
)
def test_the_command_prints_one_line(make, inputs, end, tmp_path, monkeypatch, capfd):
    folder = save(globals()[make](), inputs, tmp_path / "half")
    monkeypatch.setattr(sys, "argv", ["cacp-ray", "export", str(folder), "--format", "onnx"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "call load_subnet or export in Python, with model=" in capfd.readouterr().err
    change(folder, model=f"{__name__}:{make}")
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capfd.readouterr()
    assert (caught.value.code, err) == (0, "")
    assert re.search(rf"subnet\.onnx: weights after the search, .*{end}$", out)


class Counting(Segmenter):
    """The size of what it returns is the number of values above zero."""

    def forward(self, x):
        out = super().forward(x)["out"]
        kept = out[out > 0]
        return kept[: 3 if kept.numel() > 12 else 2]


@pytest.mark.parametrize("format", ["onnx", "torch-export"])
def test_sizes_that_depend_on_values_lead_to_the_page(format, tmp_path, capfd):
    net = Counting().eval()
    plan = cacp_ray.analyze(Segmenter().eval(), image())
    folder = plan.save(plan.build(plan.uniform(0.5)), tmp_path / "half")
    with pytest.raises(UnsupportedModelError, match="backbone and head alone") as caught:
        cacp_ray.export(folder, format, model=net)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""
    assert cacp_ray.export(folder, "state-dict", model=net).path.exists()
