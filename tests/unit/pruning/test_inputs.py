"""What may be handed in as a network and its inputs; everything else is one line."""

import pytest
import torch
import torch.nn.utils.prune as masks
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import cacp_ray
from cacp_ray.errors import CacpError, ConfigError

X = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    ).eval()  # fmt: skip


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(1, 8, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, image: Tensor, depth: Tensor) -> Tensor:
        return self.head(torch.cat([self.a(image), self.b(depth)], 1).relu().mean((2, 3)))


IMAGE, DEPTH = torch.randn(1, 3, 8, 8), torch.randn(1, 1, 8, 8)


@pytest.mark.parametrize(
    "given", [(IMAGE, DEPTH), [IMAGE, DEPTH], {"depth": DEPTH, "image": IMAGE}]
)
def test_several_inputs_are_taken_in_order_or_by_name(given):
    analysis = cacp_ray.analyze(Two(), given)
    assert len(analysis.groups) == 2
    small = analysis.build([2, 3])
    assert small(IMAGE, DEPTH).shape == (1, 4)


@pytest.mark.parametrize("dims", [1, 3])
def test_networks_of_one_and_three_dimensions(dims):
    conv, norm = (getattr(nn, f"{name}{dims}d") for name in ("Conv", "BatchNorm"))
    pool, average = (getattr(nn, f"{name}{dims}d") for name in ("MaxPool", "AdaptiveAvgPool"))
    model = nn.Sequential(
        conv(2, 16, 3, padding=1), norm(16), nn.ReLU(), pool(2), conv(16, 24, 3), nn.ReLU(),
        average(1), nn.Flatten(), nn.Linear(24, 3),
    )  # fmt: skip
    analysis = cacp_ray.analyze(model, torch.randn(1, 2, *[8] * dims))
    assert [group.num_channels for group in analysis.groups] == [16, 24]
    assert analysis.build([3, 5])(torch.randn(2, 2, *[8] * dims)).shape == (2, 3)


class Plain(Tensor):
    pass


def test_a_batch_of_several_a_compiled_network_and_a_subclass_are_taken():
    groups = len(cacp_ray.analyze(net(), X).groups)
    assert len(cacp_ray.analyze(net(), X.repeat(3, 1, 1, 1)).groups) == groups
    assert len(cacp_ray.analyze(net(), X.as_subclass(Plain)).groups) == groups
    compiled = torch.compile(net())
    assert len(cacp_ray.analyze(compiled, X).groups) == groups


def masked() -> nn.Module:
    model = net()
    masks.ln_structured(model[0], "weight", 0.5, 2, 0)
    return model


def normed(norm) -> nn.Module:
    model = net()
    norm(model[0])
    return model


def quantised() -> nn.Module:
    model = nn.Sequential(torch.ao.quantization.QuantStub(), *net()).train()
    model.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    return torch.ao.quantization.prepare_qat(model).eval()


NETWORKS = {
    "no network": (lambda: "resnet18", "type str: give a torch.nn.Module"),
    "traced": (lambda: torch.jit.trace(net(), X), "TorchScript"),
    "scripted": (lambda: torch.jit.script(net()), "TorchScript"),
    "exported": (lambda: torch.export.export(net(), (X,)).module(), "exported program"),
    "without values": (
        lambda: nn.Conv2d(3, 8, 3, device="meta"),
        r"weight of the network is on the meta device.*load its weights",
    ),
    "lazy": (lambda: nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten()), "layer 0 is lazy"),
    "masked": (masked, "pruning mask on its weight: call prune.remove"),
    "weight norm": (lambda: normed(parametrizations.weight_norm), "remove_parametrizations"),
    "spectral norm": (lambda: normed(parametrizations.spectral_norm), "remove_parametrizations"),
    "old weight norm": (lambda: normed(nn.utils.weight_norm), "remove_weight_norm"),
    "old spectral norm": (lambda: normed(nn.utils.spectral_norm), "remove_spectral_norm"),
    "quantised": (quantised, "quantised .*: prune the float network"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", NETWORKS)
def test_a_network_that_cannot_be_cut_is_one_line_with_the_next_step(case):
    make, message = NETWORKS[case]
    with pytest.raises(CacpError, match=message) as caught:
        cacp_ray.analyze(make(), X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (X.numpy(), "type ndarray: give a tensor"),
        ((1, 3, 16, 16), "holds no tensor"),
        (None, "type NoneType"),
        ({}, "holds no tensor"),
        ({0: X}, "no names of arguments"),
        (torch.tensor(1.0), "first dimension is the batch"),
        (X[:0], "first dimension is the batch"),
        (X[:, :2], "does not run on an input of shape"),
        ((X, X), "does not run on an input of shapes"),
    ],
)
def test_inputs_that_no_network_takes_are_one_line(given, message):
    with pytest.raises(CacpError, match=message) as caught:
        cacp_ray.analyze(net(), given)
    assert "\n" not in str(caught.value)


def test_a_floor_out_of_range_is_refused():
    with pytest.raises(ConfigError, match="floor 0"):
        cacp_ray.analyze(net(), X, floor=0.0)
