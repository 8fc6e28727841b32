"""Random and uniform allocations."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.errors import ConfigError
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.strategies import make_strategy
from tests.toy import toy_cost_model

RATES = (0.3, 0.5, 0.7)


def toy_budget(cost_model, round_to=1):
    channels = cost_model.num_channels
    return Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, round_to), round_to)


def make(name, seed=0, num_groups=8, round_to=1, rates=RATES):
    cost_model = toy_cost_model(num_groups)
    budget = toy_budget(cost_model, round_to)
    return make_strategy(name, cost_model=cost_model, budget=budget, rates=rates, seed=seed), budget


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["random", "uniform"]), st.integers(0, 99), st.sampled_from([1, 4]))
def test_every_proposal_is_legal_and_spends_its_budget(name, seed, round_to):
    strategy, budget = make(name, seed, round_to=round_to)
    for proposal in strategy.ask(9):
        counts = np.array(proposal.keep_counts)
        limit = budget.limit(proposal.rate)
        assert budget.cost(counts) <= limit
        assert (counts >= budget.min_counts).all()
        assert ((counts % round_to == 0) | (counts == budget.num_channels)).all()
        grown = np.minimum(counts // round_to * round_to + round_to, budget.num_channels)
        steps = np.where(np.eye(len(counts), dtype=bool), grown, counts)
        assert ((budget.cost(steps) > limit) | (counts == budget.num_channels)).all()


def test_random_proposals_depend_on_seed_and_number_alone():
    one, _ = make("random", seed=3)
    other, _ = make("random", seed=3)
    together = one.ask(10)
    assert [proposal for size in (1, 4, 5) for proposal in other.ask(size)] == together
    assert make("random", seed=4)[0].ask(10) != together


def test_random_serves_all_rates_equally_and_repeats_little():
    strategy, _ = make("random")
    proposals = strategy.ask(300)
    assert [p.rate for p in proposals[:6]] == [*RATES, *RATES]
    assert len({p.keep_counts for p in proposals}) > 250


def test_random_widths_favour_no_group():
    strategy, budget = make("random", rates=(0.5,))
    counts = np.array([p.keep_counts for p in strategy.ask(500)])
    ratios = (counts / budget.num_channels).mean(axis=0)
    # What is left over at the end only buys channels of cheap groups.
    assert ratios.max() - ratios.min() < 0.15


def test_uniform_has_two_candidates_a_rate_and_then_ends():
    strategy, _ = make("uniform")
    cost_model = toy_cost_model()
    is_residual = np.array([group.is_residual for group in cost_model.groups])
    proposals = strategy.ask(4) + strategy.ask(4)
    assert [p.rate for p in proposals] == [0.3, 0.3, 0.5, 0.5, 0.7, 0.7]
    assert strategy.ask(1) == []
    ratios = np.array(proposals[-2].keep_counts) / cost_model.num_channels
    assert ratios.max() - ratios.min() < 0.15
    inner = np.array(proposals[-1].keep_counts)
    assert (inner == cost_model.num_channels)[is_residual].all()


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_a_restored_strategy_goes_on_where_it_was(name, tmp_path):
    strategy, _ = make(name, seed=5)
    strategy.ask(2)
    strategy.save(tmp_path)
    other, _ = make(name, seed=5)
    other.restore(tmp_path)
    assert other.ask(3) == strategy.ask(3)


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean uniform"):
        make("unifrom")
