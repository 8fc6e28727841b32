"""Work that PyTorch's counter does not know is counted, or named; fast paths hide none."""

import numpy as np
import pytest
import torch
import torchvision.ops
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import cacp_ray
from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ConfigError
from cacp_ray.pruning.planner import make_plan
from cacp_ray.workflows.setup import check_counted

X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


class Branch(nn.Module):
    """Two convolutions, one of which goes through something else."""

    def __init__(self, layer: nn.Module, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 12, 3, padding=1)
        self.layer, self.head = layer, nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.b(self.a(x).relu()).relu()).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase], **options: bool) -> None:
        super().__init__()
        self.cell = cell(12, 6, 2, batch_first=True, **options)
        self.back = nn.Linear(12 if options else 6, 12)

    def forward(self, x: Tensor) -> Tensor:
        out = self.back(self.cell(x.flatten(2).transpose(1, 2))[0])
        return out.transpose(1, 2).reshape_as(x)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(12, 3, 24, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape_as(x)


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        out = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return out.transpose(1, 2).reshape_as(x)


class Deformable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.offsets = nn.Conv2d(12, 18, 3, padding=1)
        self.conv = torchvision.ops.DeformConv2d(12, 12, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x, self.offsets(x))


class Fourier(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x), s=x.shape[2:])


class Warp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        grid = torch.zeros(len(x), *x.shape[2:], 2, dtype=x.dtype)
        return nn.functional.grid_sample(x, grid, align_corners=False)


@torch.library.custom_op("cacp_tests::mix", mutates_args=())
def mix(x: Tensor) -> Tensor:
    """An operation of somebody else, of quadratic cost."""
    return torch.einsum("nchw,nchv->nchv", x, x) + x


class Foreign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return mix(x)


def total(layer: nn.Module) -> int:
    return int(cacp_ray.analyze(Branch(layer), X).budget.total)


def counted(model: nn.Module) -> int:
    """By PyTorch, with gradients, so that no fused operation of inference hides anything."""
    with FlopCounterMode(display=False) as counter:
        model(X)
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}])
@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_layer_costs_its_weights_at_every_step(cell, options):
    layer = Recurrent(cell, **options)
    weights = sum(p.numel() for n, p in layer.cell.named_parameters() if n.startswith("weight"))
    steps = 6 * 6
    assert total(layer) - total(nn.Identity()) == steps * (weights + layer.back.weight.numel())


@pytest.mark.parametrize(
    "layer", [Encoder(), Attention(), Deformable(), Fourier(), Warp()], ids=repr
)
def test_the_whole_network_costs_what_is_counted_with_gradients(layer):
    model = Branch(layer).eval()
    analysis = cacp_ray.analyze(model, X)
    assert analysis.budget.total == counted(model) > counted(Branch(nn.Identity()).eval())
    assert analysis.plan.uncounted == {}
    counts = analysis.uniform((1 + analysis.reachable[0]) / 2)
    assert counted(analysis.build(counts)) == analysis.cost(counts) < analysis.budget.total


def test_an_attention_of_known_size_costs_both_products():
    tokens, width = 36, 12
    assert total(Attention()) - total(nn.Identity()) == 2 * tokens**2 * width


def test_work_without_a_formula_is_named_and_refused():
    plan = make_plan(Branch(Foreign()).eval(), X)
    assert plan.uncounted == {"cacp_tests.mix": 1}
    assert "whose work is not counted" in plan.fixed["b"]
    with pytest.raises(
        ConfigError, match=r"cacp_tests\.mix: rates would keep more.*uncounted=ignore"
    ):
        check_counted(plan, RunConfig())
    check_counted(plan, load_config(RunConfig, {}, ["pruning.uncounted=ignore"]))
    check_counted(plan, load_config(RunConfig, {}, ["cost=params"]))
    check_counted(make_plan(Branch(nn.Identity()).eval(), X), RunConfig())


def test_the_fast_path_of_attention_is_on_again_afterwards():
    assert torch.backends.mha.get_fastpath_enabled()
    cacp_ray.analyze(Branch(Encoder()), X)
    assert torch.backends.mha.get_fastpath_enabled()


def test_cuts_around_such_layers_are_exact():
    analysis = cacp_ray.analyze(Branch(Encoder()).eval(), X)
    counts = np.maximum(analysis.plan.cost_model.num_channels // 2, 1)
    assert counted(analysis.build(counts)) == analysis.cost(counts)
