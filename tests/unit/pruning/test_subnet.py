"""A saved subnet loads in a new process to the same logits, and broken folders are refused."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from cacp_ray.errors import ArtifactError, InfeasibleRateError
from cacp_ray.models.factory import build_model
from cacp_ray.pruning.subnet import describe_kept, load_subnet, save_subnet
from cacp_ray.pruning.verify import count_macs
from cacp_ray.workflows.analyze import analyze


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    model = build_model("resnet20", 10).eval()
    found = analyze(model, torch.zeros(1, 3, 32, 32))
    counts = found.uniform(0.4)
    net = found.build(counts)
    orders = [np.arange(group.num_channels) for group in found.groups]
    description = {
        "model": "resnet20",
        "num_classes": 10,
        "input_shape": [3, 32, 32],
        "cost": "macs",
        "rate": 0.4,
        "cost_kept": 0.3999,
        "groups": describe_kept(found.plan, orders, counts),
    }
    save_subnet(tmp_path / "rate-0.40", net, description)
    return tmp_path / "rate-0.40", net


@pytest.mark.slow  # tests/unit/pruning/test_surgery.py has another in `make test`
def test_new_process_gives_the_same_logits(saved, tmp_path):
    folder, net = saved
    x = torch.randn(2, 3, 32, 32)
    torch.save(x, tmp_path / "x.pt")
    code = (
        "import sys, torch, cacp_ray\n"
        "folder, x, y = sys.argv[1:]\n"
        "torch.save(cacp_ray.load_subnet(folder)(torch.load(x)).detach(), y)"
    )
    files = [str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    assert torch.equal(torch.load(tmp_path / "y.pt"), net(x))


def test_loaded_network_is_small_and_trains(saved):
    net = load_subnet(saved[0])
    assert count_macs(net, torch.zeros(1, 3, 32, 32)) <= 0.4 * 40_813_184
    net(torch.zeros(1, 3, 32, 32)).sum().backward()
    assert net.get_parameter("conv1.weight").grad is not None


def test_broken_folders_are_refused(saved, tmp_path):
    folder, _ = saved
    with pytest.raises(ArtifactError, match=r"subnet\.json"):
        load_subnet(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="not a readable safetensors file"):
        load_subnet(folder)
    (folder / "subnet.json").write_text('{"schema_version": 99}')
    with pytest.raises(ArtifactError, match="schema version 99"):
        load_subnet(folder)


@pytest.mark.parametrize("file", ["model.safetensors", "finetuned.safetensors"])
def test_weights_of_another_rate_are_refused(saved, file, tmp_path):
    folder, net = saved
    path = folder / "subnet.json"
    params = sum(parameter.numel() for parameter in net.parameters())
    description = json.loads(path.read_text()) | {"params": params}
    path.write_text(json.dumps(description))
    assert load_subnet(folder) is not None
    found = analyze(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32))
    save_subnet(tmp_path / "other", found.build(found.uniform(0.6)), description)
    (folder / file).write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(ArtifactError, match=rf"{file}: .* subnet\.json says {params}:") as caught:
        load_subnet(folder)
    assert "\n" not in str(caught.value)


def test_unreachable_rate_names_the_reachable_one():
    found = analyze(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32), floor=0.5)
    low, high = found.reachable
    assert 0.2 < low < 0.4
    assert high == 1
    with pytest.raises(InfeasibleRateError, match=f"{low:.2f}"):
        found.uniform(0.1)


def test_uniform_uses_the_budget_up():
    found = analyze(build_model("resnet20", 10), torch.zeros(1, 3, 32, 32))
    counts = found.uniform(0.5)
    total = found.cost(found.plan.cost_model.num_channels)
    assert found.cost(counts) <= 0.5 * total
    for group in range(len(counts)):
        more = counts.copy()
        more[group] += 1
        assert more[group] > found.groups[group].num_channels or found.cost(more) > 0.5 * total
