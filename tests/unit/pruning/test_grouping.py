"""Channel groups and costs agree with those of Torch-Pruning, where both know the network."""

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn
from torchvision import models

from cacp_ray.models.factory import build_model
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.verify import count_macs
from tests.small import mostly_slow
from tests.unit.pruning import networks

tp = pytest.importorskip("torch_pruning")

FAST = ("plain", "concat", "depthwise", "resnet20", "vgg16", "torchvision:resnet18")
SIDES = {
    "plain": 8,
    "concat": 8,
    "depthwise": 8,
    "resnet20": 32,
    "vgg16": 32,
    "torchvision:resnet18": 64,
    "torchvision:resnet50": 64,
    "torchvision:mobilenet_v2": 64,
    "torchvision:mobilenet_v3_small": 64,
    "torchvision:efficientnet_b0": 64,
    "googlenet": 64,
}


@functools.cache
def planned(name):
    if name == "googlenet":
        model = models.googlenet(weights=None, num_classes=10, aux_logits=False, init_weights=False)
    else:
        model = networks.make(name)[0] if name in networks.NAMES else build_model(name, 10)
    x = torch.zeros(1, 3, SIDES[name], SIDES[name])
    return model.eval(), x, make_plan(model, x)


def build_dependency(model, x):
    return tp.DependencyGraph().build_dependency(model, example_inputs=x, verbose=False)


def cut_weights(graph, group):
    """Names of the weights that a group of Torch-Pruning cuts, as `layer.weight:dim`."""
    names = {module: name for name, module in graph.model.named_modules()}
    members = set()
    for dep, _ in group:
        module = dep.target.module
        if isinstance(module, nn.Module) and module in names and hasattr(module, "weight"):
            is_output = graph.is_out_channel_pruning_fn(dep.handler) or module.weight.ndim == 1
            is_depthwise = isinstance(module, nn.Conv2d) and module.groups > 1
            members.add(f"{names[module]}.weight:{0 if is_output or is_depthwise else 1}")
    return members


def our_weights(group):
    return {member for member in group.members if member.rpartition(":")[0].endswith(".weight")}


@pytest.mark.parametrize("name", mostly_slow(SIDES, FAST))
def test_groups_couple_the_same_layers(name):
    model, x, plan = planned(name)
    graph = build_dependency(model, x)
    fixed = [model.get_submodule(layer) for layer in plan.fixed]
    theirs = {frozenset(cut_weights(graph, group)) for group in graph.get_all_groups(fixed)}
    assert {frozenset(our_weights(group)) for group in plan.groups} == theirs


@pytest.mark.parametrize("name", mostly_slow(SIDES, FAST))
def test_dropping_channels_of_one_group_costs_the_same(name):
    model, x, plan = planned(name)
    rng = np.random.default_rng(0)
    whole = plan.cost_model.num_channels
    for g in rng.choice(len(whole), size=3, replace=False):
        count = int(rng.integers(1, whole[g]))
        small = copy.deepcopy(model)
        graph = build_dependency(small, x)
        root = small.get_submodule(plan.groups[g].name)
        prune = graph.get_pruner_of_module(root).prune_out_channels
        graph.get_pruning_group(root, prune, list(range(count, whole[g]))).prune()
        counts = whole.copy()
        counts[g] = count
        assert count_macs(small, x) == plan.macs(counts), plan.groups[g].name
        assert sum(p.numel() for p in small.parameters()) == plan.params(counts)
