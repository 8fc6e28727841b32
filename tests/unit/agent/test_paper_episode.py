import numpy as np
import pytest

from cacp_ray.agent.ddpg.episode import make_schedule, play, trace, truncated_normal
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.mdp import AllocationMDP
from cacp_ray.searching.settings import PaperSettings
from tests.toy import toy_cost_model

RATES = np.repeat([0.2, 0.5, 0.8], 50)


@pytest.fixture(scope="module")
def mdp():
    cost_model = toy_cost_model(8)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    return AllocationMDP(cost_model, budget, uniform_prior(8), 0.8)


def play_randomly(mdp, seed=0):
    rng = np.random.default_rng(seed)
    return play(mdp, RATES, lambda states, step: rng.random(len(states)))


def test_the_schedule_at_800_evaluations_is_the_published_one():
    schedule = make_schedule(PaperSettings(), 800)
    assert schedule.warmup == 300
    later = np.arange(500)
    np.testing.assert_allclose(schedule.sigma(300 + later), 0.5 * 0.95**later)


def test_the_schedule_keeps_its_shape_at_other_lengths():
    short, long = (make_schedule(PaperSettings(), evaluations) for evaluations in (80, 8000))
    assert (short.warmup, long.warmup) == (30, 3000)
    np.testing.assert_allclose(short.sigma([30 + 10, 30 + 50]), long.sigma([3000 + 1000, 8000]))
    make_schedule(PaperSettings(warmup_share=1.0), 10)  # no episode is left to learn from


def test_random_episodes_stay_within_budget_and_need_not_spend_it(mdp):
    counts, limit = play_randomly(mdp), mdp.budget.limit(RATES)
    assert (mdp.budget.cost(counts) <= limit).all()
    assert (counts >= mdp.budget.min_counts).all()
    assert (counts <= mdp.budget.num_channels).all()
    one_more = [
        mdp.budget.cost(counts + np.eye(8, dtype=np.int64)[group]) <= limit for group in range(8)
    ]
    assert np.any(one_more), "what is left would buy one more channel"


def test_an_action_keeps_the_ceiling_of_its_share_unless_clamped(mdp):
    channels = mdp.budget.num_channels
    counts = play(mdp, [1.0], lambda states, step: np.array([0.37]))
    np.testing.assert_array_equal(counts[0], np.ceil(0.37 * channels))
    greedy = play(mdp, [0.5], lambda states, step: np.array([1.0]))[0]
    assert greedy[0] == channels[0]  # the first groups take all they ask for,
    assert greedy[-1] < 0.5 * channels[-1]  # and the last ones pay
    smallest = play(mdp, [0.5], lambda states, step: np.array([0.0]))
    np.testing.assert_array_equal(smallest[0], mdp.budget.min_counts)


def test_a_trace_is_the_episode_that_was_played(mdp):
    seen, counts = [], None

    def act(states, step):
        seen.append(states)
        return np.random.default_rng(step).random(len(states))

    counts = play(mdp, RATES, act)
    states, ratios = trace(mdp, RATES, counts)
    np.testing.assert_array_equal(states, np.stack(seen, axis=1))
    np.testing.assert_allclose(ratios, counts / mdp.budget.num_channels, rtol=1e-6)
    np.testing.assert_array_equal(play(mdp, RATES, lambda states, step: ratios[:, step]), counts)


def test_an_episode_does_not_depend_on_its_batch(mdp):
    def act(states, step):
        return states[:, 8] * (0.5 + 0.1 * step)

    together = play(mdp, RATES, act)
    alone = np.concatenate([play(mdp, [rate], act) for rate in RATES])
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(("low", "mean"), [(0.0, 0.0), (0.0, 0.5), (-1.0, 0.9), (0.0, 1.0)])
def test_noise_stays_in_range_and_is_a_cut_off_normal(low, mean):
    rng = np.random.default_rng(0)
    sigma = 0.5
    drawn = truncated_normal(np.full(20000, mean), np.full(20000, sigma), low, rng)
    normal = rng.normal(mean, sigma, 200000)
    expected = normal[(normal >= low) & (normal <= 1)]
    assert low <= drawn.min()
    assert drawn.max() <= 1
    levels = [0.1, 0.5, 0.9]
    np.testing.assert_allclose(
        np.quantile(drawn, levels), np.quantile(expected, levels), atol=0.015
    )


def test_noise_that_has_faded_leaves_the_action():
    rng = np.random.default_rng(0)
    mean = np.array([0.0, 0.25, 1.0])
    np.testing.assert_array_equal(truncated_normal(mean, np.zeros(3), 0.0, rng), mean)
    faded = truncated_normal(mean, np.full(3, 1e-13), 0.0, rng)
    np.testing.assert_allclose(faded, mean, atol=1e-10)
