"""Final subnets built by tasks: equal results, dying processes, subnets that cannot be built."""

import dataclasses
import os
import signal

import numpy as np
import pytest
import ray
import torch

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.distributed import building
from cacp_ray.distributed.building import build_on_nodes, is_alone
from cacp_ray.distributed.tasks import share
from cacp_ray.errors import EvaluationError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.searching.budget import uniform
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.winners import build_here, builder_settings

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]


@dataclasses.dataclass
class Deadly:
    """Kills the first processes that read it from Ray's store, `deaths` in all."""

    folder: str
    value: object
    deaths: int

    def __reduce__(self):
        return _read, (self.folder, self.value, self.deaths)


def _read(folder, value, deaths):
    died = len(os.listdir(folder))
    if died < deaths:
        open(os.path.join(folder, str(died)), "x").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return value


@pytest.mark.slow
def test_tasks_build_what_this_process_builds_though_one_of_theirs_dies(tmp_path):
    config = load_config(RunConfig, {}, ["pruning.calibration_images=300"])
    setup = Setup.create(config)
    setup = dataclasses.replace(setup, task=Classification(setup.search.take(200))).prepare()
    rates = [0.3, 0.5]
    rows = uniform(setup.budget, rates, np.ones(len(setup.plan.groups))).tolist()
    subnets = [(tuple(row), "") for row in rows]
    stored, task = share(setup.task)
    deadly = ray.put(Deadly(str(tmp_path), setup.prepared, deaths=1))
    settings = builder_settings(setup)
    built = list(build_on_nodes(subnets, deadly, stored, settings, cpus=1, gpus=0.5))
    assert len(os.listdir(tmp_path)) == 1
    expected = list(build_here(dataclasses.replace(setup, task=task))(subnets))
    assert built[0].scored.score != built[1].scored.score
    for one, other in zip(built, expected, strict=True):
        assert one.is_sequential == other.is_sequential
        assert one.scored.score == pytest.approx(other.scored.score, abs=0.01)
        assert one.scored.images == 200
        tensors, flags = one.net.state_dict(), dict(other.net.named_parameters())
        for name, value in other.net.state_dict().items():
            assert torch.allclose(tensors[name], value, rtol=1e-2, atol=1e-3), name
        for name, parameter in one.net.named_parameters():
            assert parameter.requires_grad == flags[name].requires_grad, name


@pytest.mark.slow
def test_processes_that_always_die_end_it(tmp_path, monkeypatch):
    monkeypatch.setattr(building, "MAX_ATTEMPTS", 2)
    deadly = ray.put(Deadly(str(tmp_path), None, deaths=99))
    networks = build_on_nodes([((1,), "")], deadly, ray.put(None), {}, cpus=1, gpus=0.0)
    with pytest.raises(EvaluationError, match="give nodes more memory"):
        next(networks)
    assert len(os.listdir(tmp_path)) == 2


def test_what_cannot_be_built_is_one_line():
    split, _ = share(np.zeros(3))
    networks = build_on_nodes([((1,), "")], ray.put(None), split, {}, cpus=1, gpus=0.0)
    with pytest.raises(
        EvaluationError, match=r"^a final subnet cannot be built: TypeError: [^\n]+$"
    ):
        next(networks)


def test_a_machine_without_others_is_alone():
    assert is_alone()
