import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from cacp_ray.errors import ConfigError, InfeasibleRateError
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.env import ENV_ID, ChannelAllocationEnv
from cacp_ray.searching.mdp import AllocationMDP
from tests.toy import toy_cost_model, toy_score

pytestmark = pytest.mark.filterwarnings("error")

RATES = (0.3, 0.5, 0.7)
COST_MODEL = toy_cost_model(6)
SCORE = toy_score(COST_MODEL)


def make_mdp(*whole) -> AllocationMDP:
    """The toy problem; the groups `whole` may not be cut."""
    channels = COST_MODEL.num_channels
    least = minimum_counts(channels, 0.1, 1)
    least[list(whole)] = channels[list(whole)]
    return AllocationMDP(
        COST_MODEL, Budget(COST_MODEL.macs, channels, least), uniform_prior(len(channels)), 0.8
    )


def make_env(mdp, score=SCORE):
    return gym.make(ENV_ID, mdp=mdp, rates=RATES, score=score, disable_env_checker=False)


@pytest.mark.parametrize("whole", [(), (0, 4), (5,)])
def test_gymnasium_accepts_the_environment_without_a_warning(whole):
    check_env(make_env(make_mdp(*whole)).unwrapped)


@pytest.mark.parametrize("whole", [(), (0, 4), (5,)])
def test_an_episode_ends_as_a_rollout_of_the_same_actions(whole):
    mdp = make_mdp(*whole)
    env = make_env(mdp)
    rng = np.random.default_rng(0)
    for rate in (*RATES, 0.42):
        actions = rng.uniform(-1, 1, mdp.num_steps).astype(np.float32)
        counts = mdp.play([rate], lambda states, step, a=actions: a[step : step + 1])
        env.reset(options={"rate": rate})
        for action in actions[:-1]:
            _, reward, terminated, truncated, info = env.step(np.array([action]))
            assert (reward, terminated, truncated, info) == (0, False, False, {"rate": rate})
        _, reward, terminated, truncated, info = env.step(actions[-1:])
        assert (terminated, truncated) == (True, False)
        assert info["keep_counts"] == tuple(counts[0])
        assert reward == SCORE(info["keep_counts"])
        assert info["cost_kept"] == mdp.budget.cost(counts)[0] / mdp.budget.total <= rate


def test_groups_that_may_not_be_cut_are_no_steps_and_stay_whole():
    env = make_env(make_mdp(0, 4))
    env.reset(seed=0, options={"rate": 0.5})
    ends = [env.step(np.array([-1], np.float32))[2] for _ in range(3)]
    *_, terminated, _, info = env.step(np.array([-1], np.float32))
    assert [*ends, terminated] == [False, False, False, True]
    for group in (0, 4):
        assert info["keep_counts"][group] == COST_MODEL.num_channels[group]


def test_the_same_keep_counts_are_scored_once():
    asked = []
    env = make_env(make_mdp(), lambda counts: asked.append(counts) or SCORE(counts))

    def play(action):
        env.reset(options={"rate": 0.5})
        for _ in range(6):
            _, reward, *_ = env.step(np.array([action], np.float32))
        return reward

    assert play(0) == play(0) != play(0.5)
    assert len(asked) == 2


def test_rates_follow_the_seed():
    env = make_env(make_mdp())

    def draw(seed):
        first = env.reset(seed=seed)[1]["rate"]
        return [first, *(env.reset()[1]["rate"] for _ in range(20))]

    assert draw(3) == draw(3)
    assert set(draw(3)) == set(RATES)


def test_rates_that_cannot_be_reached_are_refused():
    mdp = make_mdp(0, 4)
    with pytest.raises(ConfigError, match="no rates"):
        ChannelAllocationEnv(mdp, (), SCORE)
    with pytest.raises(InfeasibleRateError, match=r"rate 0\.0100 is below"):
        ChannelAllocationEnv(mdp, (0.5, 0.01), SCORE)
    with pytest.raises(InfeasibleRateError, match="between"):
        ChannelAllocationEnv(mdp, RATES, SCORE).reset(options={"rate": 1.2})


def test_steps_without_an_episode_or_a_number_are_refused():
    env = ChannelAllocationEnv(make_mdp(), RATES, SCORE)
    action = np.zeros(1, np.float32)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
    env.reset(seed=0)
    with pytest.raises(gym.error.InvalidAction, match="nan"):
        env.step(np.array([np.nan]))
    for _ in range(6):
        env.step(action)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(action)
