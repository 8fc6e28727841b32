"""Published costs, and what may not be cut."""

import pytest
import torch
from torch import nn

from cacp_ray.errors import ConfigError, UnsupportedModelError
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.verify import count_macs
from tests.small import mostly_slow

# Multiply-accumulates as published: ResNet-20/56 (He et al., 2016: 0.27 M and 0.85 M parameters),
# VGG-16 for CIFAR 314.59 M (CACP, table 1, with more linear layers), ResNet-50 4.09 G
# and MobileNetV2 300-315 M for ImageNet (torchvision's model tables).
GOLDEN = {
    "resnet20": (32, 40.8e6, 0.01, 0.27e6),
    "resnet56": (32, 125.7e6, 0.01, 0.855e6),
    "vgg16": (32, 313.2e6, 0.01, 14.72e6),
    "torchvision:resnet50": (224, 4.09e9, 0.01, 23.5e6),
    "torchvision:mobilenet_v2": (224, 0.3e9, 0.05, 2.24e6),
}


@pytest.mark.parametrize("name", mostly_slow(GOLDEN, ("resnet20", "vgg16")))
def test_whole_network_costs_what_is_published(name):
    side, macs, tolerance, params = GOLDEN[name]
    model = build_model(name, 10).eval()
    x = torch.zeros(1, 3, side, side)
    plan = make_plan(model, x)
    counts = plan.cost_model.num_channels
    assert plan.macs(counts) == pytest.approx(macs, rel=tolerance)
    assert plan.macs(counts) == count_macs(model, x)
    assert plan.params(counts) == pytest.approx(params, rel=0.02)
    assert plan.params(counts) == sum(p.numel() for p in model.parameters())


def test_memory_layout_does_not_change_the_groups():
    model = build_model("resnet20", 10)
    x = torch.zeros(1, 3, 32, 32)
    plain = make_plan(model, x)
    nhwc = make_plan(
        model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    )
    assert nhwc.groups == plain.groups
    assert len(plain.groups) == 12


def test_outputs_stay_whole_with_a_reason():
    plan = make_plan(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32))
    assert plan.fixed == {"fc": "output of the network"}


def test_keep_patterns_select_groups_and_typos_are_refused():
    plan = make_plan(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32))
    prunable = plan.select_groups(["layer1.*.conv1"])
    assert (~prunable).sum() == 3
    with pytest.raises(ConfigError, match="stem"):
        plan.select_groups(["stem.*"])


def test_network_without_prunable_channels_is_refused():
    with pytest.raises(UnsupportedModelError, match="no prunable channels"):
        make_plan(nn.Conv2d(3, 4, 1), torch.zeros(1, 3, 4, 4))


def test_wrong_input_size_is_refused_in_one_line():
    with pytest.raises(UnsupportedModelError, match="check the inputs") as caught:
        make_plan(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(8, 4, 1)), torch.zeros(1, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_unknown_operations_freeze_their_channels_with_a_reason():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 6, 1)
            self.b = nn.Conv2d(6, 6, 1)
            self.c = nn.Conv2d(6, 5, 1)

        def forward(self, x):
            return self.c(self.b(self.a(x).sort(dim=1).values)).mean((2, 3))

    plan = make_plan(Sorted(), torch.zeros(1, 3, 4, 4))
    assert [group.name for group in plan.groups] == ["b"]
    assert "sort" in plan.fixed["a"]


class Finds(nn.Module):
    """Returns the scores that stand out: how many they are depends on the data."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 12, 3), nn.ReLU(), nn.Conv2d(12, 8, 3), nn.ReLU())
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        scores = self.head(self.body(x)).flatten(1)[0]
        return {"scores": scores[scores > scores.mean() + scores.std()]}


class Assumes(Finds):
    """Assumes eight channels: the first size of its output changes when they are cut."""

    def forward(self, x):
        return self.body(x).reshape(-1, 8, 4)


@pytest.mark.parametrize("seed", range(3))
def test_an_output_whose_size_depends_on_data_freezes_nothing(seed):
    torch.manual_seed(seed)
    plan = make_plan(Finds(), torch.rand(1, 3, 10, 10))
    assert [group.num_channels for group in plan.groups] == [12, 8]


def test_an_output_whose_size_depends_on_channels_freezes_them():
    torch.manual_seed(0)
    plan = make_plan(Assumes(), torch.rand(1, 3, 10, 10))
    assert [group.num_channels for group in plan.groups] == [12]
