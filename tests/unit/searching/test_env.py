import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.env import ENV_ID
from cacp_ray.searching.mdp import AllocationMDP
from tests.toy import toy_cost_model, toy_score

RATES = (0.3, 0.5, 0.7)
COST_MODEL = toy_cost_model(6)
SCORE = toy_score(COST_MODEL)


@pytest.fixture
def mdp() -> AllocationMDP:
    channels = COST_MODEL.num_channels
    budget = Budget(COST_MODEL.macs, channels, minimum_counts(channels, 0.1, 1))
    return AllocationMDP(COST_MODEL, budget, np.ones(len(channels)), 0.8)


@pytest.fixture
def env(mdp):
    return gym.make(ENV_ID, mdp=mdp, rates=RATES, score=SCORE)


# Both are what the checker says of every environment made by gymnasium.make.
@pytest.mark.filterwarnings("ignore:.*is different from the unwrapped version.*")
@pytest.mark.filterwarnings("ignore:.*Not able to test alternative render modes.*")
@pytest.mark.filterwarnings("ignore:.*no spec.*:UserWarning")
def test_gymnasium_accepts_the_environment(env):
    check_env(env.unwrapped)


def test_an_episode_ends_as_a_rollout_of_the_same_actions(env, mdp):
    rng = np.random.default_rng(0)
    for rate in (*RATES, 0.42):
        actions = rng.uniform(-1, 1, mdp.num_steps).astype(np.float32)
        rollout = mdp.rollout([rate], lambda states, step, a=actions: a[step : step + 1])
        env.reset(options={"rate": rate})
        for action in actions:
            _, reward, is_done, _, info = env.step(np.array([action]))
        assert is_done
        assert info["keep_counts"] == tuple(rollout.keep_counts[0])
        assert reward == SCORE(info["keep_counts"])


def test_rates_follow_the_seed(env):
    def draw(seed):
        first = env.reset(seed=seed)[1]["rate"]
        return [first, *(env.reset()[1]["rate"] for _ in range(20))]

    assert draw(3) == draw(3)
    assert set(draw(3)) == set(RATES)
