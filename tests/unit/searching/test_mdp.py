from types import SimpleNamespace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.searching.allocation import Prior
from cacp_ray.searching.budget import Budget, minimum_counts, uniform
from cacp_ray.searching.mdp import AllocationMDP
from tests.toy import toy_cost_model

NUM_GROUPS = 9


def make_mdp(seed=0, round_to=1, inner_only=False, action_scale=0.8) -> AllocationMDP:
    cost_model = toy_cost_model(NUM_GROUPS, seed)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, round_to), round_to)
    weights = [not (inner_only and group.is_residual) for group in cost_model.groups]
    return AllocationMDP(cost_model, budget, Prior(np.array(weights)), action_scale)


mdps = st.builds(
    make_mdp,
    seed=st.integers(0, 5),
    round_to=st.sampled_from([1, 4]),
    inner_only=st.booleans(),
    action_scale=st.sampled_from([0.4, 0.8, 1.5]),
)
rate_lists = st.lists(st.floats(0.15, 1.0), min_size=1, max_size=4)


def rollout(mdp, rates, act):
    keep_counts = mdp.play(rates, act)
    states, actions = mdp.replay(rates, keep_counts)
    return SimpleNamespace(keep_counts=keep_counts, states=states, actions=actions)


def play(actions):
    return lambda states, step: actions[:, step]


@settings(max_examples=30, deadline=None)
@given(mdps, rate_lists, st.integers(0, 1000))
def test_rollouts_spend_the_budget_and_replay_to_themselves(mdp, rates, seed):
    actions = np.random.default_rng(seed).uniform(-1, 1, (len(rates), NUM_GROUPS))
    played = rollout(mdp, rates, play(actions))
    assert (mdp.budget.cost(played.keep_counts) <= mdp.budget.limit(rates)).all()
    assert (np.abs(played.actions) <= 1).all()
    assert (played.states >= -1e-6).all()
    assert (played.states <= 1 + 1e-6).all()

    again = rollout(mdp, rates, play(played.actions))
    is_inside = (np.abs(played.actions) < 1).all(axis=1)
    np.testing.assert_array_equal(again.keep_counts[is_inside], played.keep_counts[is_inside])
    np.testing.assert_array_equal(again.actions[is_inside], played.actions[is_inside])
    np.testing.assert_array_equal(again.states[is_inside], played.states[is_inside])


@settings(max_examples=30, deadline=None)
@given(mdps, rate_lists)
def test_zero_actions_are_the_prior_at_every_rate(mdp, rates):
    played = rollout(mdp, rates, lambda states, step: np.zeros(len(states)))
    np.testing.assert_array_equal(played.keep_counts, mdp.prior(rates))
    np.testing.assert_array_equal(played.actions, 0)


def test_the_prior_is_uniform():
    mdp = make_mdp()
    expected = uniform(mdp.budget, [0.3, 0.6], np.ones(NUM_GROUPS))
    np.testing.assert_array_equal(mdp.prior([0.3, 0.6]), expected)


def test_candidates_of_a_batch_do_not_touch_each_other():
    mdp = make_mdp()
    actions = np.random.default_rng(0).uniform(-1, 1, (5, NUM_GROUPS))
    rates = np.linspace(0.2, 0.9, 5)
    together = rollout(mdp, rates, play(actions)).keep_counts
    for i in range(5):
        alone = rollout(mdp, rates[i : i + 1], play(actions[i : i + 1])).keep_counts[0]
        np.testing.assert_array_equal(alone, together[i])


def test_a_bold_first_step_is_paid_for_by_all_later_groups():
    mdp = make_mdp()
    actions = np.zeros((1, NUM_GROUPS))
    actions[0, 0] = 1
    bold = rollout(mdp, [0.5], play(actions)).keep_counts[0] / mdp.budget.num_channels
    prior = mdp.prior([0.5])[0] / mdp.budget.num_channels
    assert bold[0] > prior[0]
    lost = 1 - bold[1:] / prior[1:]
    assert lost.min() > -0.1
    assert lost.max() < 0.45


def test_states_tell_rates_and_what_was_spent_apart():
    mdp = make_mdp()
    low = rollout(mdp, [0.3], lambda states, step: np.zeros(1)).states[0]
    high = rollout(mdp, [0.7], lambda states, step: np.zeros(1)).states[0]
    assert low.shape == (NUM_GROUPS, mdp.state_size)
    np.testing.assert_allclose(low[:, 8], 0.3)
    assert (np.diff(low[:, 9]) > 0).all()  # Reduced grows with every cut
    assert (np.diff(low[:, 10]) < 0).all()  # Rest shrinks
    assert (low[1:, 9] > high[1:, 9]).all()
