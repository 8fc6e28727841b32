import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.errors import InfeasibleRateError
from cacp_ray.searching.budget import Budget, minimum_counts, spend, uniform
from tests.toy import toy_cost_model, with_toy_latency

COST_MODELS = [
    with_toy_latency(toy_cost_model(groups, seed), seed)
    for groups, seed in ((1, 0), (5, 1), (12, 2))
]
SEVERAL = {"macs": 1.0, "params": 1.5, "latency": 1.2}


def make_budget(cost_model, round_to=1, floor=0.1, cost="macs") -> Budget:
    channels = cost_model.num_channels
    return Budget(
        cost_model.kind(cost), channels, minimum_counts(channels, floor, round_to), round_to
    )


budgets = st.builds(
    make_budget,
    st.sampled_from(COST_MODELS),
    round_to=st.sampled_from([1, 3, 8, 16]),
    floor=st.sampled_from([0.01, 0.1, 0.5]),
    cost=st.sampled_from(["macs", "params", "latency", SEVERAL]),
)


def reachable_rates(budget: Budget, draw, size: int):
    smallest = budget.smallest / budget.total
    shares = draw(st.lists(st.floats(0, 1), min_size=size, max_size=size))
    rates = smallest + (1 - smallest) * np.array(shares)
    return np.where(budget.limit(rates) >= budget.smallest, rates, np.nextafter(rates, 2) + 1e-9)


def assert_exact(budget: Budget, counts, rates) -> None:
    limit = budget.limit(rates)
    share = np.asarray(rates) * float(budget.cost(budget.num_channels))
    assert (budget.cost(counts) <= share).all()
    assert (limit > share - 1).all()
    assert (counts >= budget.min_counts).all()
    is_legal = (counts % budget.round_to == 0) | (counts == budget.num_channels)
    assert is_legal.all()
    for group in range(counts.shape[1]):
        more = counts.copy()
        more[:, group] = budget.count(counts[:, group] // budget.round_to + 1, group)
        is_whole = counts[:, group] == budget.num_channels[group]
        assert (is_whole | (budget.cost(more) > limit)).all()


@settings(max_examples=60, deadline=None)
@given(budgets, st.data())
def test_spending_is_never_above_the_budget_and_leaves_no_step(budget, data):
    rates = reachable_rates(budget, data.draw, 4)
    seed = data.draw(st.integers(0, 2**32 - 1))
    share = np.random.default_rng(seed).lognormal(-0.5, 1.0, (4, len(budget.num_channels)))
    assert_exact(budget, spend(budget, share * budget.num_channels, rates), rates)


@settings(max_examples=60, deadline=None)
@given(budgets, st.data())
def test_uniform_is_never_above_the_budget_and_leaves_no_step(budget, data):
    rates = reachable_rates(budget, data.draw, 4)
    size = len(budget.num_channels)
    weights = data.draw(st.lists(st.integers(0, 1), min_size=size, max_size=size))
    assert_exact(budget, uniform(budget, rates, weights), rates)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(COST_MODELS), st.data())
def test_a_budget_of_several_costs_keeps_to_each_of_them(cost_model, data):
    budget = make_budget(cost_model, cost=SEVERAL)
    rates = reachable_rates(budget, data.draw, 4)
    counts = uniform(budget, rates, np.ones(len(budget.num_channels)))
    for name, weight in SEVERAL.items():
        cost = cost_model.kind(name)
        most = np.minimum(weight * rates, 1) * int(cost(budget.num_channels))
        assert (cost(counts) <= most * (1 + 1e-12)).all()


@settings(max_examples=40, deadline=None)
@given(budgets, st.data())
def test_spending_what_is_spent_changes_nothing(budget, data):
    rates = reachable_rates(budget, data.draw, 3)
    counts = uniform(budget, rates, np.ones(len(budget.num_channels)))
    np.testing.assert_array_equal(spend(budget, counts.astype(float), rates), counts)


def test_growing_together_equals_growing_one_step_at_a_time():
    budget = make_budget(COST_MODELS[1], round_to=2)
    channels = budget.num_channels
    for seed in range(10):
        desired = np.random.default_rng(seed).uniform(0.3, 0.6, (1, len(channels))) * channels
        rate = [0.6]
        counts = np.clip(desired, budget.min_counts, channels)
        counts = budget.floor_to_legal(counts)[0]
        wanted = np.clip(desired, budget.min_counts, channels)[0]
        limit = budget.limit(rate)[0]
        assert budget.cost(counts) <= limit
        while True:
            best = None
            for group in np.argsort(counts / wanted, kind="stable"):
                trial = counts.copy()
                trial[group] = budget.count(counts[group] // 2 + 1, group)
                if counts[group] < channels[group] and budget.cost(trial) <= limit:
                    best = trial
                    break
            if best is None:
                break
            counts = best
        np.testing.assert_array_equal(spend(budget, desired, rate)[0], counts)


def test_uniform_keeps_the_same_share():
    budget = make_budget(COST_MODELS[2])
    ratios = uniform(budget, [0.3, 0.5, 0.7], np.ones(12)) / budget.num_channels
    step = 1 / budget.num_channels.min()
    assert (np.ptp(ratios, axis=1) <= 2.5 * step).all()


def test_groups_of_weight_0_shrink_only_where_they_must():
    budget = make_budget(COST_MODELS[2])
    weights = np.arange(12) % 3 > 0
    counts = uniform(budget, [0.1, 0.5], weights)
    whole = counts[:, ~weights] == budget.num_channels[~weights]
    assert whole[1].all()
    assert not whole[0].all()
    assert (counts[0, weights] <= budget.min_counts[weights] + 4).all()


def test_a_group_smaller_than_a_step_is_kept_whole():
    channels = np.array([6, 64])
    np.testing.assert_array_equal(minimum_counts(channels, 0.1, 8), [6, 8])
    np.testing.assert_array_equal(minimum_counts(channels, 0.2, 1), [2, 13])


def test_an_unreachable_rate_names_the_smallest_one():
    budget = make_budget(COST_MODELS[1], floor=0.5)
    with pytest.raises(InfeasibleRateError, match=r"rate 0\.1000 .* reachable 0\.\d{4} ") as caught:
        budget.check(0.1)
    named = float(str(caught.value).split("reachable ")[1].split()[0])
    budget.check(named)
    with pytest.raises(InfeasibleRateError, match="between"):
        budget.check(1.5)
