"""RLlib's own PPO trains on the environment, and docs/environment.md runs as it stands."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.env import ENV_ID
from cacp_ray.searching.mdp import AllocationMDP
from tests.toy import toy_cost_model, toy_score

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PAGE = Path(__file__).parents[2] / "docs" / "environment.md"
RATES = (0.3, 0.5, 0.7)
WHOLE = 3  # the group that may not be cut


def test_ppo_learns_better_allocations_than_the_prior_within_budget(ray_cluster):
    cost_model = toy_cost_model(8, seed=2)
    channels = cost_model.num_channels
    least = minimum_counts(channels, 0.1, 1)
    least[WHOLE] = channels[WHOLE]
    mdp = AllocationMDP(cost_model, Budget(cost_model.macs, channels, least), uniform_prior(8), 0.8)
    formula, scores = toy_score(cost_model, seed=2), []

    def score(keep_counts):
        assert mdp.budget.cost(np.array(keep_counts)) <= mdp.budget.limit(max(RATES))
        scores.append(formula(keep_counts))
        return scores[-1]

    agent = (
        PPOConfig()
        .environment(ENV_ID, env_config={"mdp": mdp, "rates": RATES, "score": score})
        .env_runners(num_env_runners=0)
        .training(train_batch_size_per_learner=32 * 7, minibatch_size=64, num_epochs=10)
        .training(lr=1e-3, gamma=1.0, lambda_=1.0)
        .rl_module(model_config=DefaultModelConfig(fcnet_hiddens=[32, 32]))
        .debugging(seed=2)
        .build_algo()
    )
    for _ in range(8):
        seen = agent.train()["env_runners"]
        assert seen["episode_len_min"] == seen["episode_len_max"] == 7
        assert min(scores) <= seen["episode_return_min"] <= seen["episode_return_max"]
        assert seen["episode_return_max"] <= max(scores)
    assert seen["num_episodes_lifetime"] == 8 * 32
    module = agent.get_module()
    assert module is not None

    def act(states, step):
        with torch.inference_mode():
            outputs = module.forward_inference({"obs": torch.from_numpy(states)})
        return outputs["action_dist_inputs"][:, 0].clamp(-1, 1).numpy()

    rates = (0.25, 0.4, 0.6, *RATES)
    answers = mdp.play(rates, act)
    agent.stop()
    assert (mdp.budget.cost(answers) <= mdp.budget.limit(rates)).all()
    assert (answers[:, WHOLE] == channels[WHOLE]).all()
    learned = np.mean([formula(tuple(counts)) for counts in answers])
    prior = np.mean([formula(tuple(counts)) for counts in mdp.prior(rates)])
    assert learned > prior + 0.02


def test_every_code_block_of_the_page_runs(ray_cluster, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    for block in blocks:
        exec(compile(block, PAGE.name, "exec"), names)
    sizes = [len([line for line in block.splitlines() if line.strip()]) for block in blocks]
    assert len(blocks) == 5
    assert sizes[2] <= 6
    assert sizes[3] <= 15

    mdp, shown = names["mdp"], names["info"]
    assert names["terminated"]
    assert names["reward"] == names["score"](shown["keep_counts"])
    assert 0.4 < shown["cost_kept"] <= shown["rate"] == 0.42
    assert names["observation"].shape == (13,)

    returns = [float(line) for line in capsys.readouterr().out.splitlines()[-4:]]
    assert all(0 < mean < 1 for mean in returns)
    limits = mdp.budget.limit([0.3, 0.42, 0.7])
    assert (mdp.budget.cost(names["answers"]) <= limits).all()

    own = names["own"]
    assert own.budget.limit([0.5]) == mdp.budget.limit([0.5])
    whole = names["own_score"](tuple(own.budget.num_channels.tolist()))
    assert whole > names["own_score"](tuple(own.prior([0.3])[0].tolist()))
