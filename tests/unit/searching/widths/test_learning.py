"""What holds for every method that learns widths."""

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cacp_ray.errors import ConfigError
from cacp_ray.pruning.resizable import build_subnet
from cacp_ray.pruning.surgery import Cutter, all_tensors, reorder_weights
from cacp_ray.searching.widths.method import TrainingBatch, expected_cost
from cacp_ray.searching.widths.table import FEWEST_STEPS, FOR_ALL_RATES, MAKERS, make_method
from cacp_ray.training.loop import make_optimizer
from cacp_ray.training.recipe import Recipe
from tests.small import mostly_slow
from tests.unit.pruning.networks import make
from tests.unit.searching.widths.common import equal_states, learn, open_small, problem_of

NAMES = sorted(MAKERS)
# chex and scp refuse groups without BN, which two of these networks have.
PAIRS = [(name, "padding") for name in NAMES] + [
    (name, network)
    for name in NAMES
    if name not in ("chex", "scp")
    for network in ("concat", "depthwise")
]
EPOCHS = {"dmcp": 13}  # steps in the fewest epochs that it takes


def fewest(name):
    return EPOCHS.get(name, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_rate_is_met_exactly_and_nothing_is_left_that_a_channel_could_use(name):
    rates = (0.4, 0.7) if name in FOR_ALL_RATES else (0.4,)
    _, problem, states = learn(name, "resnet", rates=rates, epochs=fewest(name))
    budget = problem.budget
    assert [row["rate"] for row in states[-1]["widths"]] == list(rates)
    for row in states[-1]["widths"]:
        counts = row["keep_counts"].numpy()
        assert (counts >= budget.min_counts).all()
        assert budget.cost(counts) <= budget.limit(row["rate"])
        more = counts + np.eye(len(counts), dtype=np.int64)
        can_grow = counts < budget.num_channels
        assert (budget.cost(more)[can_grow] > budget.limit(row["rate"])).all()
        for order, group in zip(row["orders"], problem.plan.groups, strict=True):
            assert sorted(order.tolist()) == list(range(group.num_channels))


@pytest.mark.parametrize("name", NAMES)
def test_an_interrupted_training_ends_with_the_same_bits(name):
    rates = (0.4, 0.7) if name in FOR_ALL_RATES else (0.4,)
    options = {"rates": rates, "epochs": fewest(name), "distillation": 0.0}
    _, _, whole = learn(name, "plain", **options)
    half = fewest(name) // 2
    _, _, rest = learn(name, "plain", **options, state=whole[half])
    assert len(rest) == fewest(name) - half - 1
    assert equal_states(rest[-1], whole[-1])


@pytest.mark.parametrize(
    ("name", "network"), mostly_slow(PAIRS, [("chex", "padding"), ("group_fisher", "concat")])
)
def test_coupled_channels_are_cut_together_in_any_network(name, network):
    _, problem, states = learn(name, network, epochs=fewest(name))
    row = states[-1]["widths"][0]
    orders, counts = [order.numpy() for order in row["orders"]], row["keep_counts"].tolist()
    ordered = reorder_weights(problem.plan, states[-1]["model"], orders)
    model, x = make(network)
    small = build_subnet(model, ordered | Cutter(problem.plan)(ordered, counts)).eval()
    assert small(x).isfinite().all()
    kept = sum(p.numel() for p in small.parameters())
    assert kept == int(problem.plan.params(counts))


@pytest.mark.slow
@pytest.mark.parametrize("network", ["vgg11_bn", "mobilenet_v2", "densenet121"])
@pytest.mark.parametrize("name", NAMES)
def test_networks_of_torchvision_are_cut(name, network):
    torch.manual_seed(0)
    model = models.get_model(network, num_classes=5)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    bare = ("classifier.*",) if network == "vgg11_bn" and name in ("chex", "scp") else ()
    problem = problem_of(model.eval(), x, steps=4, keep=bare)
    method = MAKERS[name](problem, model)
    recipe = Recipe(lr=0.01)
    optimizer = make_optimizer(model, recipe)
    for _ in range(problem.steps):
        optimizer.zero_grad()
        method.loss(TrainingBatch(model.train(), x, y, recipe)).backward()
        optimizer.step()
        method.after_step()
    widths = method.finish()[0]
    counts = widths.keep_counts.tolist()
    assert problem.budget.cost(widths.keep_counts) <= problem.budget.limit(0.5)
    template = models.get_model(network, num_classes=5)
    ordered = reorder_weights(problem.plan, all_tensors(model), widths.orders)
    small = build_subnet(template, ordered | Cutter(problem.plan)(ordered, counts)).eval()
    assert small(x).isfinite().all()
    assert sum(p.numel() for p in small.parameters()) == int(problem.plan.params(counts))


@pytest.mark.parametrize("name", ["chex", "scp"])
def test_groups_without_batch_norm_are_named(name):
    model, _, problem = open_small("depthwise")
    with pytest.raises(ConfigError, match=r"no BN layer follows squeeze: choose group_fisher"):
        make_method(name, problem, model)


@pytest.mark.parametrize("name", NAMES)
def test_channels_without_a_gate_are_refused(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.ConvTranspose2d(16, 16, 2, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    ).eval()  # fmt: skip
    problem = problem_of(model, torch.randn(1, 3, 8, 8))
    with pytest.raises(ConfigError, match=r"no gates for the channels of 0, .* \(pruning.keep\)"):
        make_method(name, problem, model)


@pytest.mark.parametrize("name", NAMES)
def test_too_short_a_training_is_refused_with_the_steps_it_needs(name):
    model, _, problem = open_small("plain", steps=FEWEST_STEPS[name] - 1)
    with pytest.raises(ConfigError, match=rf"{name} needs {FEWEST_STEPS[name]} steps"):
        make_method(name, problem, model)


@pytest.mark.parametrize("name", ["dmcp", "scp"])
def test_a_cost_without_a_derivative_is_refused(name):
    model, _, problem = open_small("plain", cost="several")
    with pytest.raises(ConfigError, match="set cost macs or params"):
        make_method(name, problem, model)


@pytest.mark.parametrize("cost", ["macs", "params"])
def test_the_expected_cost_is_the_mean_cost_of_drawn_widths(cost):
    _, _, problem = open_small("plain", cost=cost)
    rng = np.random.default_rng(0)
    whole = problem.budget.num_channels
    drawn = rng.binomial(whole, 0.4, size=(40_000, len(whole)))
    model = getattr(problem.plan.cost_model, cost)
    mean = model(drawn).mean()
    expected = expected_cost(problem, torch.as_tensor(0.4 * whole))
    assert float(expected) == pytest.approx(mean, rel=5e-3)


def test_the_expected_cost_of_whole_groups_is_the_cost():
    _, _, problem = open_small("resnet")
    counts = torch.as_tensor(problem.budget.num_channels).double().requires_grad_()
    cost = expected_cost(problem, counts)
    assert cost.item() == problem.budget.total
    (slope,) = torch.autograd.grad(cost, counts)
    assert (slope > 0).all()
