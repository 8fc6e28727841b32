"""`analyze` refuses what it cannot use in one line, and costs what it builds."""

from functools import partial

import numpy as np
import pytest
import torch

from cacp_ray.api import export, load_subnet
from cacp_ray.errors import ConfigError, UnsupportedModelError
from cacp_ray.pruning.verify import count_macs
from cacp_ray.workflows.analyze import analyze
from tests.unit.pruning.networks import NAMES, make


@pytest.mark.parametrize("name", NAMES)
def test_what_is_built_costs_what_is_told(name):
    model, x = make(name)
    found = analyze(model, x[:1])
    rng = np.random.default_rng(0)
    batch = rng.integers(1, found.plan.cost_model.num_channels + 1, (3, len(found.groups)))
    told = found.cost(batch)
    assert told.shape == (3,)
    for counts, macs in zip(batch, told, strict=True):
        assert count_macs(found.build(counts), x[:1]) == macs
        assert found.cost(counts.tolist()) == macs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda counts: counts[:-1], "3 channel groups"),
        (lambda counts: [*counts, 1], "3 channel groups"),
        (lambda counts: 4, "3 channel groups"),
        (lambda counts: [counts[0], 0, counts[2]], r"keep count 0 of group 3: .* 1 to 12"),
        (lambda counts: [counts[0], -1, counts[2]], r"keep count -1 of group 3: .* 1 to 12"),
        (lambda counts: [*counts[:2], 17], r"keep count 17 of group 6: .* 1 to 16"),
        (lambda counts: [*counts[:2], 1.5], "whole numbers"),
    ],
)
def test_keep_counts_that_do_not_fit_are_refused_with_the_group(change, message):
    model, x = make("plain")
    found = analyze(model, x[:1])
    counts = change([group.num_channels for group in found.groups])
    for use in (found.build, found.cost):
        with pytest.raises(ConfigError, match=message) as caught:
            use(counts)
        assert "\n" not in str(caught.value)


def test_several_keep_counts_are_costed_but_not_built():
    model, x = make("plain")
    found = analyze(model, x[:1])
    with pytest.raises(ConfigError, match=r"shape \(2, 3\)"):
        found.build(np.ones((2, 3), dtype=np.int64))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), ()])
def test_an_example_has_a_batch(shape):
    with pytest.raises(ConfigError, match="the first dimension is the batch"):
        analyze(make("plain")[0], torch.zeros(shape))


def test_an_example_without_its_batch_is_refused():
    with pytest.raises(UnsupportedModelError, match=r"expected input.*check the inputs"):
        analyze(make("plain")[0], torch.zeros(3, 8, 8))


def test_cost_is_that_of_one_example_of_a_batch():
    model, x = make("plain")
    assert analyze(model, x.repeat(4, 1, 1, 1)).budget.total == analyze(model, x).budget.total


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.1, float("nan")])
def test_a_floor_that_is_no_share_is_refused(floor):
    model, x = make("plain")
    with pytest.raises(ConfigError, match=f"floor {floor}") as caught:
        analyze(model, x[:1], floor=floor)
    assert "\n" not in str(caught.value)
    assert analyze(model, x[:1], floor=1.0).reachable == (1.0, 1.0)


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda plan: plan.uniform("a"), "rate 'a': give a number"),
        (lambda plan: plan.uniform(None), "rate None: give a number"),
        (lambda plan: plan.uniform(float("nan")), "rate nan: give a number"),
        (lambda plan: plan.calibrate([], images="10"), "images '10': give a whole number"),
        (lambda plan: plan.calibrate([], images=0), "images 0: .* at least 1"),
        (lambda plan: plan.calibrate([], images=True), "images True: .* at least 1"),
        (lambda plan: plan.calibrate([], loss="mse"), r"of type str: give loss\(net, batch\)"),
        (lambda plan: plan.build([8, 12, 16], criterion=None), "criterion is of type NoneType"),
        (lambda plan: plan.build([8, 12, 16], len), "criterion is of type builtin_function"),
        (lambda plan: plan.build([[8], [1, 2], 3]), "one whole number for each group"),
        (lambda plan: plan.build("all"), r"keep counts of shape \(\)"),
        (lambda plan: plan.save("net", "folder"), "a network that build of this analysis has made"),
        (lambda plan: analyze(plan.model, plan.inputs, floor="a"), "floor a: it must be"),
    ],
)
def test_arguments_of_another_type_are_refused_in_one_line(use, message):
    model, x = make("plain")
    with pytest.raises(ConfigError, match=message) as caught:
        use(analyze(model, x[:1]))
    assert "\n" not in str(caught.value)


def test_an_analysis_shows_itself_in_one_line():
    model, x = make("plain")
    found = analyze(model, x[:1])
    assert repr(found) == f"Analysis(Plain, 3 channel groups, {found.budget.total:,} MACs)"


def test_the_readme_of_a_built_network_names_it_and_no_search(tmp_path):
    model, x = make("plain")
    found = analyze(model, x[:1])
    folder = found.save(found.build(found.uniform(0.5)), tmp_path / "half")
    about = " ".join((folder / "README.md").read_text().split())
    assert "of the MACs of Plain kept)" in about
    assert "holds the weights as they were cut or repaired," in about
    assert "python:" not in about
    for use in (load_subnet, partial(export, format="state-dict")):
        with pytest.raises(ConfigError, match="is of type str: give a torch") as caught:
            use(folder, model="Plain")
        assert "\n" not in str(caught.value)
