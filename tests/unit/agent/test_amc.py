"""AMC: an agent of its own for every rate."""

import numpy as np
import pytest
import torch

from cacp_ray.agent.amc import AMC
from cacp_ray.searching.settings import PaperSettings
from tests.toy import five_group_problem, toy_problem
from tests.toy import measure_by_formula as measure

RATES = (0.3, 0.5, 0.7)
SMALL = {"hidden": (48, 48)}


@pytest.fixture
def amc():
    mdp, score = toy_problem(0)
    amc = AMC(PaperSettings(**SMALL), mdp, RATES, 0, 80)
    yield amc, mdp, score
    amc.stop()


def test_amc_splits_evaluations_evenly(amc):
    amc, _, _ = amc
    asked = [proposal.rate for _ in range(16) for proposal in amc.ask(5)]
    assert sorted(map(asked.count, RATES)) == [26, 27, 27]
    assert [agent.schedule.warmup for agent in amc.agents.values()] == [10, 10, 10]


def test_amc_keeps_its_agents_apart(amc):
    amc, _, score = amc
    results = measure(amc.ask(60), score)
    first, *others = amc.agents.values()
    before = [agent.get_module().actor[0].weight.clone() for agent in amc.agents.values()]
    amc.tell([result for result in results if result[0].rate == RATES[0]])
    amc.learn()
    after = [agent.get_module().actor[0].weight for agent in amc.agents.values()]
    changed = [not torch.equal(old, new) for old, new in zip(before, after, strict=True)]
    assert changed == [True, False, False]
    assert first.num_episodes == 20
    assert all(agent.num_episodes == 0 for agent in others)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_amc_comes_near_the_optimum_of_every_rate_within_150_episodes_of_each(seed):
    """Five groups of at most nine legal counts: the optimum is known from trying them all.

    The paper's agent starts from nothing: its random warm-up has 0.7 of the optimum on average.
    """
    mdp, score, optima = five_group_problem(seed, RATES)
    amc = AMC(PaperSettings(**SMALL), mdp, RATES, seed, 450)
    found = {rate: [] for rate in RATES}
    for first in range(0, 450, 6):
        results = measure(amc.ask(6), score, first)
        for candidate, measurement in results:
            found[candidate.rate].append(measurement.score)
        amc.tell(results)
        amc.learn()
    amc.stop()
    tops = np.array([found[rate] for rate in RATES]) / optima[:, None]  # (R, 150)
    assert (tops.max(axis=1) >= 0.92).all()
    assert (tops <= 1 + 1e-9).all()
    assert (tops[:, :56].mean(axis=1) <= 0.72).all()  # the warm-up
    assert (tops[:, -30:].mean(axis=1) >= 0.78).all()


def test_amc_continues_bit_for_bit(amc, tmp_path):
    amc, mdp, score = amc
    amc.tell(measure(amc.ask(60), score))
    assert amc.learn() == {"updates": 30 * mdp.num_steps}  # 30 of the 60 are warm-up
    amc.save(tmp_path)
    other = AMC(PaperSettings(**SMALL), mdp, RATES, 5, 80)
    other.restore(tmp_path)
    for twin in (amc, other):
        twin.tell(measure(twin.ask(6), score, 60))
        twin.learn()
    assert amc.ask(7) == other.ask(7)
    for rate, agent in amc.agents.items():
        np.testing.assert_array_equal(agent.policy([rate]), other.agents[rate].policy([rate]))
    other.stop()
