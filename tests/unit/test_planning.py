import dataclasses

import pytest

from cacp_ray import planning
from cacp_ray.config import RunConfig, load_config
from cacp_ray.loading import load_base
from cacp_ray.planning import describe_estimate, estimate_search


@pytest.fixture(scope="module")
def base():
    return load_base(RunConfig())


def test_time_is_that_of_all_images_of_all_evaluations_shared_by_the_evaluators(base, monkeypatch):
    monkeypatch.setattr(planning, "time_image", lambda *_: 0.001)
    changes = ["cluster.max_evaluators=3", "cluster.cpus_per_evaluator=2", "evaluations=600"]
    found = estimate_search(load_config(RunConfig, {}, changes), base, [8, 3, 0], can_grow=True)
    assert (found.nodes, found.places, found.evaluators) == (3, 5, 3)
    assert found.seconds_per_evaluation == pytest.approx(1.5)
    assert found.seconds == pytest.approx(300)
    assert found.core_hours == pytest.approx(0.5)
    assert found.split_bytes == 1500 * 32 * 32 * 3
    many = load_config(RunConfig, {}, [*changes, "cluster.max_evaluators=64"])
    assert estimate_search(many, base, [8, 3], can_grow=True).evaluators == 64
    assert estimate_search(many, base, [8, 3], can_grow=False).evaluators == 5
    assert estimate_search(many, base, [1], can_grow=False).evaluators == 1
    part = load_config(RunConfig, {}, [*changes, "evaluation.images=500"])
    assert estimate_search(part, base, [2], can_grow=True).seconds == pytest.approx(100)


def test_a_small_network_takes_less_time_than_a_large_one(base):
    small, large = (
        min(
            planning.time_image(load_config(RunConfig, {"rates": [rate]}), base, 200) for _ in "123"
        )
        for rate in (0.1, 1.0)
    )
    assert 0 < small < large


def test_an_estimate_reads_as_lines(base, monkeypatch):
    monkeypatch.setattr(planning, "time_image", lambda *_: 0.001)
    found = dataclasses.replace(
        estimate_search(RunConfig(), base, [2], can_grow=False), evaluators=2, evaluator_bytes=2**30
    )
    text = " ".join(describe_estimate(found, 0.0))
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
    priced = " ".join(describe_estimate(found, 0.0, 1.3))
    assert "price: about 0.13 for the evaluations, at 1.3 a core-hour" in priced
    text = "\n".join(describe_estimate(found, 0.25, price=0.05))
    assert "neither time nor price nor room is estimated" in text
    assert "core-hour" not in text
