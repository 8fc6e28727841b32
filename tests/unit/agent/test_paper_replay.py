import numpy as np
import pytest
from ray.rllib.core.columns import Columns

from cacp_ray.agent.ddpg.replay import CAPACITY, Replay

STEPS, FEATURES = 4, 3


@pytest.fixture
def replay():
    replay = Replay(STEPS, FEATURES)
    states = np.arange(2 * STEPS * FEATURES, dtype=np.float32).reshape(2, STEPS, FEATURES)
    replay.add(states=states, actions=states[..., 0] / 100, scores=[0.8, np.nan])
    return replay


def test_rewards_on_each_step_sum_to_the_accuracy(replay):
    rewards = replay.transitions("bootstrap", False)[Columns.REWARDS].reshape(2, STEPS)
    np.testing.assert_allclose(rewards.sum(axis=1), [0.8, 0.0])
    assert (rewards == rewards[:, :1]).all()


def test_the_baseline_is_one_number_for_all_steps(replay):
    plain = replay.transitions("bootstrap", False)[Columns.REWARDS]
    less = replay.transitions("bootstrap", True)[Columns.REWARDS]
    np.testing.assert_allclose(plain - less, 0.4 / STEPS, rtol=1e-6)
    assert abs(less.sum()) < 1e-6


def test_transitions_lead_to_the_next_state_and_end_once_an_episode(replay):
    rows = replay.transitions("bootstrap", False)
    is_last = rows[Columns.TERMINATEDS].astype(bool)
    np.testing.assert_array_equal(np.flatnonzero(is_last), [3, 7])
    np.testing.assert_array_equal(
        rows[Columns.NEXT_OBS][~is_last], rows[Columns.OBS][np.flatnonzero(~is_last) + 1]
    )
    np.testing.assert_array_equal(
        rows[Columns.ACTIONS][:, 0], rows[Columns.OBS][:, 0] / np.float32(100)
    )


def test_monte_carlo_targets_are_what_the_rest_of_the_episode_earns(replay):
    bootstrap, monte_carlo = (
        replay.transitions(kind, False) for kind in ("bootstrap", "monte_carlo")
    )
    rest = np.cumsum(bootstrap[Columns.REWARDS].reshape(2, STEPS)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(monte_carlo[Columns.REWARDS], rest.ravel(), rtol=1e-6)
    assert monte_carlo[Columns.TERMINATEDS].all()


def test_only_the_last_episodes_are_kept(replay):
    for i in range(CAPACITY):
        states = np.full((1, STEPS, FEATURES), i)
        replay.add(states=states, actions=np.zeros((1, STEPS)), scores=[0.5])
    assert len(replay) == CAPACITY
    assert replay.num_added == CAPACITY + 2
    np.testing.assert_array_equal(replay.states[:, 0, 0], np.arange(CAPACITY))
    assert (replay.accuracies() == 0.5).all()


def test_samples_are_transitions_drawn_evenly(replay):
    rows = replay.sample(8000, "bootstrap", True, np.random.default_rng(0))
    states, counts = np.unique(rows[Columns.OBS], axis=0, return_counts=True)
    assert len(states) == 2 * STEPS
    assert counts.min() > 850
    np.testing.assert_allclose(rows[Columns.ACTIONS][:, 0], rows[Columns.OBS][:, 0] / 100)


def test_scores_of_another_unit_are_scaled_to_the_rewards_of_the_paper():
    replay = Replay(STEPS, FEATURES)
    states = np.zeros((4, STEPS, FEATURES), np.float32)
    replay.add(states=states, actions=states[..., 0], scores=[28.0, np.nan, 24.0, 26.0])
    assert replay.accuracies().tolist() == [1.0, 0.0, 0.0, 0.5]
