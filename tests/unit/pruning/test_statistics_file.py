"""Saved statistics are read bit for bit, and only under their own key."""

import dataclasses
import logging

import numpy as np
import pytest
import torch

from cacp_ray.data.images import ImageSet
from cacp_ray.pruning import statistics as module_of_statistics
from cacp_ray.pruning.planner import make_plan
from cacp_ray.pruning.statistics_file import load_statistics, save_statistics, statistics_key
from tests.unit.pruning.networks import make
from tests.unit.pruning.test_statistics import collect


def image_set(seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    return ImageSet(images, rng.integers(0, 5, 6), tuple("abcde"))


def saved(path, monkeypatch):
    torch.manual_seed(1)
    model, _ = make("plain")
    x = torch.randn(6, 3, 8, 8)
    monkeypatch.setattr(module_of_statistics, "SEPARABLE_ABOVE", 100)
    plan, statistics = collect(model, x, torch.arange(6) % 5, kinds={"inputs", "gates"})
    save_statistics(path, statistics, "key")
    assert {m.taps is None for m in statistics.inputs.values()} == {True, False}
    return plan, statistics


def test_what_is_read_is_what_was_saved_bit_for_bit(tmp_path, monkeypatch):
    path = tmp_path / "statistics.safetensors"
    _, statistics = saved(path, monkeypatch)
    found = load_statistics(path, "key")
    assert list(found.inputs) == list(statistics.inputs)
    for name, moments in statistics.inputs.items():
        for field, value in vars(moments).items():
            assert np.array_equal(getattr(found.inputs[name], field), value)
    for ours, gate in zip(found.gates, statistics.gates, strict=True):
        assert np.array_equal(ours.square, gate.square)
        assert np.array_equal(ours.absolute, gate.absolute)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_a_missing_file_or_one_of_something_else_is_not_used(tmp_path, monkeypatch, caplog):
    path = tmp_path / "statistics.safetensors"
    assert load_statistics(path, "key") is None
    saved(path, monkeypatch)
    assert load_statistics(path, "other") is None
    assert not caplog.records


@pytest.mark.parametrize("keep", [0, 7, 300, -10])
def test_a_damaged_file_is_not_used_and_logged_in_one_line(tmp_path, monkeypatch, caplog, keep):
    path = tmp_path / "statistics.safetensors"
    saved(path, monkeypatch)
    path.write_bytes(path.read_bytes()[:keep])
    with caplog.at_level(logging.WARNING):
        assert load_statistics(path, "key") is None
    (record,) = caplog.records
    assert "statistics.safetensors" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_the_key_tells_everything_apart_that_changes_the_statistics():
    model, x = make("plain")
    plan = make_plan(model, x[:1])
    other_model, other_x = make("concat")
    images = image_set()
    changed = images.images.copy()
    changed[5, 7, 7, 2] ^= 1
    relabelled = images.labels.copy()
    relabelled[5] += 1
    options = {"seed": 0, "kinds": {"inputs"}}

    def key(sha256="a", plan=plan, images=images, **change):
        return statistics_key(sha256, plan, images, **(options | change))

    keys = [
        key(),
        key(sha256="b"),
        key(plan=make_plan(other_model, other_x[:1])),
        key(images=dataclasses.replace(images, images=changed)),
        key(images=dataclasses.replace(images, labels=relabelled)),
        key(images=dataclasses.replace(images, std=(1.0, 1.0, 1.0))),
        key(images=images.take(5)),
        key(seed=1),
        key(kinds={"inputs", "gates"}),
        key(positions=16),
    ]
    assert len(set(keys)) == len(keys)
    assert key(images=image_set()) == key()
