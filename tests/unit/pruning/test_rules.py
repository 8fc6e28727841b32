"""Each coupling of channels is found, cut and counted, and equals zeros in their place."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from cacp_ray.errors import ConfigError, UnsupportedModelError
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.resizable import ResizableNetwork
from cacp_ray.pruning.subnet import load_subnet, save_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors, reorder_weights
from cacp_ray.pruning.verify import count_macs, zero_channels
from cacp_ray.workflows.analyze import analyze
from tests.unit.pruning.couplings import COUPLINGS, NORMALISED, Fn, Net

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def make(name):
    torch.manual_seed(0)
    model = COUPLINGS[name][0]().eval()
    for value in all_tensors(model).values():
        if value.ndim == 1 and value.is_floating_point():
            value.uniform_(0.5, 1.5)
    return model, make_plan(model, X[:1])


@pytest.mark.parametrize("name", COUPLINGS)
def test_groups_are_found_and_what_stays_whole_has_a_reason(name):
    _, plan = make(name)
    _, groups, whole = COUPLINGS[name]
    assert {group.name for group in plan.groups} == groups
    assert whole <= plan.fixed.keys()
    assert bool(plan.normalised) == (name in NORMALISED)


@pytest.mark.parametrize("name", COUPLINGS)
def test_cut_networks_run_cost_what_is_predicted_and_equal_masked_ones(name):
    model, plan = make(name)
    channels = plan.cost_model.num_channels
    rng = np.random.default_rng(0)
    resizable, masked = ResizableNetwork(model), ResizableNetwork(model)
    tensors = all_tensors(model)
    orders = [rng.permutation(count) for count in channels]
    ordered = reorder_weights(plan, tensors, orders)
    candidates = [
        plan.least_counts,
        channels,
        *rng.integers(plan.least_counts, channels + 1, (4, len(channels))),
    ]
    for counts in candidates:
        small = resizable.load(Cutter(plan)(ordered, counts.tolist()))
        with torch.inference_mode():
            output = small(X)
        assert output.shape == (2, 5)
        assert count_macs(small, X[:1]) == plan.macs(counts)
        assert sum(p.numel() for p in small.parameters()) == plan.params(counts)
        if name not in NORMALISED:
            with torch.inference_mode():
                expected = masked.load(zero_channels(plan, tensors, counts, orders))(X)
            torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    whole = resizable.load(Cutter(plan)(ordered, channels.tolist()))(X)
    torch.testing.assert_close(whole, model(X), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("factory", ["blurred", "tied_weights"])
def test_saved_subnets_hold_what_the_state_dict_leaves_out_or_shares(factory, tmp_path):
    name = f"tests.unit.pruning.couplings:{factory}"
    torch.manual_seed(0)
    model = build_model(name, 5).eval()
    found = analyze(model, X[:1])
    small = found.build(found.uniform(0.5)).eval()
    description = {"model": name, "num_classes": 5, "input_shape": [3, 8, 8], "cost": "macs"}
    save_subnet(tmp_path, small, description | {"rate": 0.5, "cost_kept": 0.5})
    loaded = load_subnet(tmp_path)
    assert torch.equal(loaded(X), small(X))
    assert len(list(loaded.parameters())) == len(list(small.parameters()))


ACTIVATIONS = (
    "ReLU", "ReLU6", "SiLU", "GELU", "ELU", "CELU", "SELU", "LeakyReLU", "RReLU", "Hardswish",
    "Hardsigmoid", "Hardtanh", "Mish", "Sigmoid", "Tanh", "Softplus", "Softsign", "Dropout2d",
)  # fmt: skip


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("inplace", [False, True])
def test_channels_pass_through_activations(name, inplace):
    kind = getattr(nn, name)
    has_inplace = "inplace" in inspect.signature(kind).parameters
    layer = kind(inplace=inplace) if has_inplace else kind()
    assert len(make_plan(Net(layer).eval(), X[:1]).groups) == 2


class Counting(nn.Module):
    """A network that counts its passes or answers with noise."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("passes", torch.zeros(8, 1, 1))

    def forward(self, x):
        if self.kind == "counts":
            self.passes += 1
        return x + torch.randn_like(x) if self.kind == "random" else x


def test_analysis_leaves_the_network_as_it_was():
    model = Net(Counting("counts")).train()
    model.last.eval()
    make_plan(model, X[:1])
    assert model.training
    assert not model.last.training
    assert not model.between.passes.any()


def test_networks_that_answer_at_random_are_refused_in_one_line():
    with pytest.raises(UnsupportedModelError, match="alike twice"):
        make_plan(Net(Counting("random")).eval(), X[:1])


def test_built_networks_keep_what_was_frozen():
    torch.manual_seed(0)
    model = Net(nn.BatchNorm2d(8))
    model.first.requires_grad_(False)
    found = analyze(model, X[:1])
    small = found.build(found.uniform(0.5))
    assert not small.get_parameter("first.weight").requires_grad
    assert small.get_parameter("last.weight").requires_grad


class Outputs(Net):
    def forward(self, x):
        y = super().forward(x)
        return {"logits": y, "first": y[:, 0], "best": y.argmax(1), "sum": y.sum()}


def test_outputs_may_be_of_any_shape():
    assert len(make_plan(Outputs(nn.BatchNorm2d(8)).eval(), X[:1]).groups) == 2


class SizeTwice(nn.Module):
    """A layer whose attribute is the width of its output; its input happens to be as wide."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.gain_in = nn.Parameter(torch.rand(8))
        self.gain_out = nn.Parameter(torch.rand(8))
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y = self.conv(x * self.gain_in.view(1, -1, 1, 1)) * self.gain_out.view(1, -1, 1, 1)
        return y.reshape(-1, self.width, *x.shape[2:])


def test_groups_are_cut_apart_when_a_plan_is_tried_out():
    plan = make_plan(Net(SizeTwice()).eval(), X[:1])
    assert len({"first", "between.conv"} & {group.name for group in plan.groups}) < 2


def test_a_norm_after_two_layers_and_a_shared_weight_are_not_compensated():
    shared = Net(Fn(lambda s, x: s.n(s.a(x)) + s.n(s.b(x)), a=nn.Conv2d(8, 8, 1),
                    b=nn.Conv2d(8, 8, 1), n=nn.BatchNorm2d(8)))  # fmt: skip
    norms = {c.module: c.batch_norm for c in make_plan(shared.eval(), X[:1]).consumers}
    assert norms["between.a"] is None
    assert norms["between.b"] is None
    tied = make_plan(COUPLINGS["tied weights"][0]().eval(), X[:1])
    assert {c.module for c in tied.consumers} == {"last", "fc"}


def test_keep_patterns_name_the_layers_that_make_channels():
    plan = make_plan(COUPLINGS["transposed"][0]().eval(), X[:1])
    is_prunable = plan.select_groups(["between"])
    names = [group.name for group, free in zip(plan.groups, is_prunable, strict=True) if not free]
    assert names == ["between"]
    assert plan.select_groups(["fc"]).all()
    with pytest.raises(ConfigError, match="matches no layer"):
        plan.select_groups(["nothing.*"])
