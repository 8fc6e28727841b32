import dataclasses

import pytest
import torch

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.distributed.nodes import Nodes
from cacp_ray.evaluation.gpu import Need
from cacp_ray.pruning.compensation import CACHE_BYTES
from cacp_ray.workflows import dry_run, estimate
from cacp_ray.workflows.estimate import (
    GpuFigures,
    describe_estimate,
    estimate_on_gpus,
    estimate_search,
)
from cacp_ray.workflows.setup import Setup


@pytest.fixture(scope="module")
def setup():
    return Setup.create(RunConfig())


def under(setup, config):
    return dataclasses.replace(setup, config=config)


def test_time_is_that_of_all_images_of_all_evaluations_shared_by_the_evaluators(setup, monkeypatch):
    monkeypatch.setattr(estimate, "time_image", lambda *_: 0.001)
    changes = ["cluster.max_evaluators=3", "cluster.cpus_per_evaluator=2", "evaluations=600"]
    found = estimate_search(
        under(setup, load_config(RunConfig, {}, changes)), [8, 3, 0], can_grow=True
    )
    assert (found.nodes, found.places, found.evaluators) == (3, 5, 3)
    assert found.seconds_per_evaluation == pytest.approx(1.5)
    assert found.seconds == pytest.approx(300)
    assert found.hours == pytest.approx(0.5)
    assert found.split_bytes == 1500 * 32 * 32 * 3
    many = load_config(RunConfig, {}, [*changes, "cluster.max_evaluators=64"])
    assert estimate_search(under(setup, many), [8, 3], can_grow=True).evaluators == 64
    assert estimate_search(under(setup, many), [8, 3], can_grow=False).evaluators == 5
    assert estimate_search(under(setup, many), [1], can_grow=False).evaluators == 1
    part = load_config(RunConfig, {}, [*changes, "evaluation.images=500"])
    assert estimate_search(under(setup, part), [2], can_grow=True).seconds == pytest.approx(100)


@pytest.mark.slow
def test_a_small_network_takes_less_time_than_a_large_one(setup):
    def measure(rate):
        parts = estimate._parts(under(setup, load_config(RunConfig, {"rates": [rate]})), 50)
        return min(estimate.time_image(*parts, 50, torch.float32, "cpu") for _ in range(5))

    assert 0 < measure(0.1) < measure(1.0)


def test_an_estimate_reads_as_lines(setup, monkeypatch):
    monkeypatch.setattr(estimate, "time_image", lambda *_: 0.001)
    found = dataclasses.replace(
        estimate_search(setup, [2], can_grow=False), evaluators=2, evaluator_bytes=2**30
    )
    text = " ".join(describe_estimate(found))
    for part in (
        "1,500 images",
        "1.50 s on 1 core",
        "3 min 00 s",
        "0.1 core-hours",
        "2 evaluators at once, nodes: 1",
        "1.0 GB",
        "5 MB",
    ):
        assert part in text
    assert "GPU" not in text
    assert "price" not in text
    priced = " ".join(describe_estimate(found, 1.3))
    assert "price: about 0.13 for the evaluations, at 1.3 a core-hour" in priced


GPUS = Nodes({"a": 16, "b": 4, "head": 8}, {"a": 2, "b": 1, "head": 0}, frozenset())
FIGURES = {
    "a": GpuFigures(Need(5 * 2**30, 80 * 2**30), 0.0002),
    "b": GpuFigures(Need(6 * 2**30, 16 * 2**30), 0.001),
}


@pytest.mark.parametrize(("share", "places"), [("auto", 6), (1, 3), (0.25, 12)])
def test_evaluators_on_one_gpu_take_turns(setup, share, places):
    changes = {"cluster": {"gpus_per_evaluator": share}, "evaluations": 600}
    config = load_config(RunConfig, changes)
    found = estimate_on_gpus(under(setup, config), FIGURES, GPUS, can_grow=False)
    assert (found.places, found.evaluators, found.gpus) == (places, places, 3)
    assert found.seconds_per_evaluation == pytest.approx(1.5)
    assert found.seconds == pytest.approx(300)
    assert found.hours == pytest.approx(0.25)
    one = load_config(RunConfig, changes, ["cluster.max_evaluators=1"])
    assert estimate_on_gpus(
        under(setup, one), FIGURES, GPUS, can_grow=True
    ).seconds == pytest.approx(900)
    text = "\n".join(describe_estimate(found, 2))
    for part in (
        "1.50 s on a GPU of this cluster",
        f"5 min 00 s with {places} evaluators on 3 GPUs, 0.25 GPU-hours",
        "price: about 0.50 for the evaluations, at 2 a GPU-hour",
        f"{places} evaluators at once, nodes: 3",
        "6.0 GB an evaluator, of 16 GB of a GPU",
    ):
        assert part in text
    assert "core" not in text
    assert ("less than an evaluator needs" in text) == (share == 0.25)
    assert "price: less than 0.01 for" in "".join(describe_estimate(found, 0.001))


def test_what_a_gpu_is_asked_is_measured_on_a_part_of_the_split(setup, monkeypatch):
    """On this machine's CPU in the place of a GPU, whose memory is told."""
    monkeypatch.setattr(estimate, "gpu_batch_size", lambda pixels, images: 100)
    monkeypatch.setattr(estimate, "measure_need", lambda *args, **settings: Need(1000, 2**30))
    timed, time_image = [], estimate.time_image

    def time_here(*arguments):
        timed.append(arguments[-2:])
        return time_image(*arguments[:-1], "cpu")

    monkeypatch.setattr(estimate, "time_image", time_here)
    arguments = estimate.gpu_arguments(setup)
    found = estimate.measure_gpu(**arguments)
    assert len(arguments["part"]) == arguments["batch"] == 100
    assert found.need == Need(1000 + 1400 * 32 * 32 * 3 + CACHE_BYTES, 2**30)
    assert 0 < found.seconds_per_image < 1
    assert [device for _, device in timed] == ["cuda"]


FEW = {"data": {"search": {"path": "embedded:search", "rows": [0, 64]}}}


def test_where_a_cluster_has_no_gpu_yet_a_dry_run_says_so(monkeypatch, tmp_path):
    none = ({}, Nodes({"a": 2}, {"a": 0}, frozenset()))
    monkeypatch.setattr(dry_run, "read_cpus", lambda *_: [2])
    monkeypatch.setattr(dry_run, "_find_gpus", lambda *_: none)
    on_gpus, either = (
        dry_run.check_search(
            load_config(RunConfig, FEW | {"cluster": {"gpus_per_evaluator": share}}),
            tmp_path / "run",
        )
        for share in (0.25, "auto")
    )
    assert "no GPU of the cluster is free now" in on_gpus
    assert "core" not in on_gpus
    assert "none is there now, so evaluators score on CPUs" in either
    assert "of this machine" in either
    busy = ({}, Nodes({"a": 2}, {"a": 1}, frozenset()))
    monkeypatch.setattr(dry_run, "_find_gpus", lambda *_: busy)
    config = load_config(RunConfig, FEW | {"cluster": {"gpus_per_evaluator": "auto"}})
    assert "no GPU of the cluster is free now" in dry_run.check_search(config, tmp_path / "run")
