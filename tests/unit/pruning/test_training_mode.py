"""What only training runs follows a cut, or keeps the groups that it takes whole."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

import cacp_ray

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Something happens between two convolutions, in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, 2, 1), nn.Conv2d(16, 24, 3, 2, 1)
        self.norm, self.head = nn.BatchNorm2d(16), nn.Linear(24, 5)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.norm(self.a(x)).relu()
        if self.training:
            x = self.between(x)
        return self.head(self.b(x).relu().mean((2, 3)))


class Auxiliary(Net):
    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.norm(self.a(x)).relu()
        out = self.head(self.b(x).relu().mean((2, 3)))
        return (out, self.aux(x.mean((2, 3)))) if self.training else out


class Dropped(Net):
    def between(self, x: Tensor) -> Tensor:
        return functional.dropout2d(functional.dropout(x, 0.3), 0.2)


class Deep(Net):
    def between(self, x: Tensor) -> Tensor:
        noise = torch.empty(len(x), 1, 1, 1).bernoulli_(0.5)
        return x + x * noise


class Stochastic(Net):
    """Units that fire by chance: as many as there are channels."""

    def between(self, x: Tensor) -> Tensor:
        return x * torch.bernoulli(x.detach().sigmoid())


class Distilled(Net):
    def __init__(self) -> None:
        super().__init__()
        self.adapter, self.own = nn.Conv2d(16, 8, 1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        x = self.norm(self.a(x)).relu()
        out = self.head(self.b(x).relu().mean((2, 3)))
        return (out, self.own(self.adapter(x))) if self.training else out


class Fixed(Net):
    """A size in the code of the training path."""

    def between(self, x: Tensor) -> Tensor:
        return x + torch.zeros(16, 1, 1)


@pytest.mark.parametrize("kind", [Auxiliary, Dropped, Deep, Stochastic, Distilled])
def test_a_cut_network_trains_and_nothing_stays_whole_for_it(kind):
    net = kind().eval()
    analysis = cacp_ray.analyze(net, X[:1])
    assert len(analysis.groups) == 2
    small = analysis.build(analysis.plan.least_counts).train()
    outputs = small(X)
    sum(t.sum() for t in (outputs if isinstance(outputs, tuple) else (outputs,))).backward()
    assert all(p.grad is not None for p in small.parameters())


def test_cost_is_that_of_evaluation_mode():
    plain = cacp_ray.analyze(Net().eval(), X[:1])
    assert cacp_ray.analyze(Auxiliary().eval(), X[:1]).budget.total == plain.budget.total


def test_a_size_in_the_code_of_training_keeps_its_group_whole_with_the_reason():
    analysis = cacp_ray.analyze(Fixed().eval(), X[:1])
    assert [group.name for group in analysis.groups] == ["b"]
    assert "does not train when they are cut (" in analysis.plan.fixed["a"]


@pytest.mark.slow
def test_auxiliary_heads_of_torchvision_follow():
    net = models.googlenet(aux_logits=True, init_weights=False, num_classes=5).eval()
    x = torch.randn(2, 3, 64, 64)
    analysis = cacp_ray.analyze(net, x[:1])
    outputs = analysis.build(analysis.uniform(0.5)).train()(x)
    assert outputs.aux_logits1.shape == outputs.logits.shape


def test_tracing_leaves_mode_statistics_and_random_state_alone():
    net = Dropped().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    state = torch.random.get_rng_state()
    cacp_ray.analyze(net, X[:1])
    assert net.training
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
