"""Subnets cut from a larger trained one: within its widths, within the budget, of its channels."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cacp_ray.config.reading import load_config
from cacp_ray.config.run import RunConfig
from cacp_ray.errors import ArtifactError
from cacp_ray.evaluation.classification import Classification
from cacp_ray.io.files import read_json, write_json
from cacp_ray.pruning.subnet import load_subnet, read_description, save_subnet
from cacp_ray.rundir.finetuned import save_finetuned
from cacp_ray.searching.budget import spend, uniform
from cacp_ray.workflows.ladder import Rung, cut_one, end_rung, nest, open_cuts, open_rung, read_rung
from cacp_ray.workflows.setup import Setup
from cacp_ray.workflows.trained import widths_between
from cacp_ray.workflows.winners import build_here, describe_subnet


@pytest.fixture(scope="module")
def setup():
    settings = ["pruning.calibration_images=128", "pruning.sequential=False"]
    base = Setup.create(load_config(RunConfig, {}, settings)).prepare()
    return dataclasses.replace(base, task=Classification(base.search.take(200)))


@pytest.fixture(scope="module")
def trained(setup, tmp_path_factory):
    """Subnet folder at 0.7, with other weights than the search left."""
    folder = tmp_path_factory.mktemp("run") / "subnets" / "rate-0.70"
    counts = uniform(setup.budget, [0.7], np.ones(len(setup.plan.groups)))[0]
    (built,) = build_here(setup)([(tuple(counts.tolist()), "")])
    facts = {
        "rate": 0.7,
        "cost_kept": float(setup.budget.cost(counts)) / setup.budget.total,
        "keep_counts": counts.tolist(),
        "macs": int(setup.plan.macs(counts)),
        "params": int(setup.plan.params(counts)),
    }
    save_subnet(
        folder, built.net, describe_subnet(setup, facts, setup.prepared.orders, "cap", built)
    )
    with torch.no_grad():
        built.net.get_parameter("fc.bias").add_(0.01)
    save_finetuned(folder, built.net, {"score": 0.5})
    return folder


@given(data=st.data())
def test_nested_counts_meet_the_budget_within_the_larger_subnet(setup, data):
    budget = setup.budget
    larger, rate = data.draw(st.sampled_from([(0.9, 0.5), (0.7, 0.3), (0.5, 0.45)]))
    drawn = st.lists(
        st.floats(0.05, 1), min_size=len(budget.num_channels), max_size=len(budget.num_channels)
    )
    wide, narrow = (np.array(data.draw(drawn)) * budget.num_channels for _ in range(2))
    most = spend(budget, wide[None], [larger])[0]
    wanted = spend(budget, narrow[None], [rate])[0]
    found = nest(budget, wanted, most, rate)
    assert (found <= most).all()
    assert (found >= np.minimum(wanted, most)).all()  # what fitted is not given up
    assert budget.cost(found) <= budget.limit([rate])[0]
    for group in np.flatnonzero(found < most):  # nothing is left unspent
        more = found.copy()
        more[group] += 1
        assert budget.cost(more) > budget.limit([rate])[0]
    if (wanted <= most).all():
        assert (found == wanted).all()


def test_a_cut_keeps_channels_of_the_trained_subnet_alone(setup, trained):
    rung = read_rung(trained)
    counts = uniform(setup.budget, [0.4, 0.3], np.ones(len(setup.plan.groups)))
    cut = open_cuts(setup, rung)
    cuts = {rate: cut(rate, row) for rate, row in zip((0.4, 0.3), counts, strict=True)}
    for rate, wanted in zip((0.4, 0.3), counts, strict=True):
        description = cuts[rate].description
        assert (
            description["keep_counts"]
            == nest(setup.budget, wanted, rung.keep_counts, rate).tolist()
        )
        assert description["cut_from"]["rate"] == 0.7
        assert description["macs"] == setup.plan.macs(np.array(description["keep_counts"]))
        assert description["params"] == sum(p.numel() for p in cuts[rate].net.parameters())
        for group, larger, base in zip(
            description["groups"], rung.kept, setup.plan.groups, strict=True
        ):
            assert set(group["kept"]) <= set(larger)
            assert group["num_channels"] == base.num_channels
        assert setup.task.measure(cuts[rate].net).score == pytest.approx(
            description["search"]["score"]
        )


def test_a_whole_cut_is_the_trained_network_itself(setup, trained):
    rung = read_rung(trained)
    cut = cut_one(setup, rung, 0.7, rung.keep_counts)
    image = setup.search.take(8).tensors()[0]
    with torch.no_grad():
        torch.testing.assert_close(cut.net(image), rung.net(image), rtol=0, atol=1e-4)


def test_the_folder_of_the_search_then_holds_the_trained_network(setup, trained, tmp_path):
    """Its weights are those of other channels, and load all the same."""
    searched, start = tmp_path / "subnets" / "rate-0.30", tmp_path / "finetune" / "rate-0.30"
    counts = uniform(setup.budget, [0.3], np.ones(len(setup.plan.groups)))[0]
    counts[0], counts[1] = counts[0] - 1, counts[1] + 1
    (built,) = build_here(setup)([(tuple(counts.tolist()), "")])
    facts = {
        "rate": 0.3,
        "cost_kept": 0.3,
        "keep_counts": counts.tolist(),
        "macs": int(setup.plan.macs(counts)),
        "params": int(setup.plan.params(counts)),
    }
    save_subnet(
        searched, built.net, describe_subnet(setup, facts, setup.prepared.orders, "cap", built)
    )
    cut = cut_one(setup, read_rung(trained), 0.3, counts - 1)
    save_subnet(start, cut.net, cut.description)
    save_finetuned(start, cut.net, {"score": 0.8})
    end_rung(start, searched)
    assert read_description(searched)["keep_counts"] == counts.tolist()
    found = read_description(searched, is_finetuned=True)
    assert found["keep_counts"] == cut.description["keep_counts"]
    assert found["groups"] == cut.description["groups"]
    image = setup.search.take(8).tensors()[0]
    with torch.no_grad():
        torch.testing.assert_close(load_subnet(searched)(image), cut.net(image))
        assert load_subnet(searched, finetuned=False)(image).shape == (8, 10)
    assert read_rung(searched).rate == 0.3
    # Weights of another network than metrics.json says are refused.
    metrics = read_json(searched / "metrics.json")
    write_json(searched / "metrics.json", {k: v for k, v in metrics.items() if k != "subnet"})
    with pytest.raises(ArtifactError, match="a file of another subnet"):
        load_subnet(searched)


def test_nothing_is_cut_from_a_subnet_that_was_not_trained(setup, trained, tmp_path):
    for name in ("subnet.json", "model.safetensors"):
        (tmp_path / name).write_bytes((trained / name).read_bytes())
    with pytest.raises(ArtifactError, match=r"no finetuned\.safetensors.*fine-tune its run first"):
        read_rung(tmp_path)


def test_a_trained_network_of_other_groups_is_refused(setup, trained):
    rung = dataclasses.replace(read_rung(trained), net=setup.model)
    with pytest.raises(ArtifactError, match="other channel groups than the whole network"):
        open_rung(setup, rung)


@given(rate=st.floats(0.16, 1.0))
def test_widths_between_trained_rates_meet_the_budget_and_those_of_the_rates_are_theirs(
    setup, rate
):
    budget = setup.budget
    weights = np.ones(len(budget.num_channels))
    known = {each: uniform(budget, [each], weights)[0].tolist() for each in (0.3, 0.7)}
    counts = widths_between(budget, known, rate)
    limit = budget.limit([rate])[0]
    assert budget.cost(counts) <= limit
    for group in np.flatnonzero(counts < budget.num_channels):
        more = counts.copy()
        more[group] += 1
        assert budget.cost(more) > limit
    for each, row in known.items():
        assert widths_between(budget, known, each).tolist() == row


def test_a_group_with_one_channel_left_stays_as_it_is(setup):
    """It is no group of the trained network, as it cannot be cut."""
    counts = setup.plan.cost_model.num_channels // 2
    counts[3] = 1
    (built,) = build_here(setup)([(tuple(counts.tolist()), "")])
    kept = [order[:n].tolist() for order, n in zip(setup.prepared.orders, counts, strict=True)]
    rate = float(setup.budget.cost(counts)) / setup.budget.total
    rung = Rung(rate, built.net, counts, kept)
    problem, present = open_rung(setup, rung)
    assert 3 not in present
    assert len(problem.plan.groups) == len(counts) - 1
    cut = cut_one(setup, rung, rate / 3, np.maximum(counts // 2, 1))
    assert cut.description["keep_counts"][3] == 1
    assert cut.description["groups"][3]["kept"] == kept[3]
    assert cut.description["params"] == sum(p.numel() for p in cut.net.parameters())


def test_a_trained_rate_of_one_is_no_rate_above_all(setup):
    whole = setup.plan.cost_model.num_channels
    known = {0.5: (whole // 2).tolist(), 1.0: whole.tolist()}
    assert widths_between(setup.budget, known, 1.0).tolist() == whole.tolist()
    counts = widths_between(setup.budget, known, 0.8)
    assert setup.budget.cost(counts) <= setup.budget.limit([0.8])[0]
