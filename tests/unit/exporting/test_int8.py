"""An INT8 file is small, runs at any batch size, and nearly scores what the network scores."""

import math

import onnx
import pytest
import torch
from torch.utils._pytree import tree_leaves

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.exporting.formats import FORMATS
from cacp_ray.exporting.source import FileNetwork, Source
from cacp_ray.exporting.subnet import Quantization, export_subnet
from cacp_ray.pruning.arguments import Argument
from cacp_ray.pruning.inputs import call
from cacp_ray.pruning.subnet import load_subnet, save_subnet
from cacp_ray.searching.budget import uniform
from cacp_ray.workflows.export import quantization
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import build_here, describe_subnet
from tests.small import mostly_slow
from tests.unit.exporting.folders import DEPTHWISE, make_folder

FORMATS_INT8 = [name for name, kind in FORMATS.items() if kind.is_int8]


@pytest.fixture(scope="module")
def setup():
    settings = ["pruning.calibration_images=200", "pruning.sequential=False"]
    base = Setup.create(load_config(RunConfig, {}, settings)).prepare()
    return Setup(**{**vars(base), "task": Classification(base.search.take(300))})


@pytest.fixture(scope="module")
def folder(setup, tmp_path_factory):
    """A subnet of odd widths."""
    counts = uniform(setup.budget, [0.7], [1.0] * len(setup.plan.groups))[0]
    (built,) = build_here(setup)([(tuple(counts.tolist()), "")])
    facts = {
        "rate": 0.7,
        "cost_kept": 0.7,
        "keep_counts": counts.tolist(),
        "macs": int(setup.plan.macs(counts)),
        "params": int(setup.plan.params(counts)),
    }
    path = tmp_path_factory.mktemp("int8") / "rate-0.70"
    description = describe_subnet(setup, facts, setup.prepared.orders, "cap", built)
    save_subnet(path, built.net, description)
    return path


@pytest.mark.parametrize("format", mostly_slow(FORMATS_INT8, ("onnx-int8",)))
def test_an_int8_file_is_small_and_loses_little(setup, folder, format, tmp_path):
    kind = FORMATS[format]
    small = export_subnet(
        folder, format, out=tmp_path / f"net{kind.suffix}", int8=quantization(setup, 2.0)
    )
    assert small.size < 0.6 * (folder / "model.safetensors").stat().st_size
    assert small.scores is not None
    net = load_subnet(folder)
    run = kind.read(small.path, net)
    for size in (1, 5):
        images = setup.search.take(size).tensors()[0]
        (logits,) = run(images)
        with torch.no_grad():
            expected = net(images)
        assert logits.shape == expected.shape
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert 0 < error < 0.3  # close, and no longer in float32
    if format == "onnx-int8":
        proto = onnx.load(small.path)
        notes = {entry.key: entry.value for entry in proto.metadata_props}
        assert '"rate": 0.7' in notes["cacp_ray"]
        weights = [array for array in proto.graph.initializer if len(array.dims) == 4]
        assert {array.data_type for array in weights} == {onnx.TensorProto.INT8}


@pytest.mark.parametrize("loss", [0.2, math.nan])
def test_a_file_that_loses_more_than_allowed_is_not_kept(tmp_path, loss):
    folder = make_folder(tmp_path / "rate-0.50", DEPTHWISE, 8)
    before = sorted(folder.iterdir())
    scores = iter([0.9, 0.9 - loss])
    int8 = Quantization(
        [torch.randn(8, 3, 8, 8)], lambda net: next(scores), 0.1, lambda score: f"{score:.1f}"
    )
    message = rf"0\.9 in float32, {0.9 - loss:.1f} in INT8"
    with pytest.raises(EvaluationError, match=message) as caught:
        export_subnet(folder, "onnx-int8", int8=int8)
    assert caught.value.exit_code == 1
    assert sorted(folder.iterdir()) == before


class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return {"out": self.layer(x), "both": (x, x + 1)}


def test_a_file_is_called_as_its_network_is():
    net = Two().eval()
    source = Source(net, (Argument(None, (4,)),), "")
    file = FileNetwork(lambda inputs: tree_leaves(call(net, inputs)), source)
    x = torch.ones(2, 4)
    with torch.no_grad():
        output, expected = file(x), net(x)
    assert torch.equal(output["out"], expected["out"])
    assert all(map(torch.equal, output["both"], expected["both"]))
