"""The prior is chosen by measurement, and the choice survives a restart at any point."""

import numpy as np
import pytest

from cacp_ray.evaluation.measurement import Candidate, Measurement
from cacp_ray.searching.budget import Budget, minimum_counts, uniform
from cacp_ray.searching.strategies.prior import PriorFirst, prior_weights
from cacp_ray.searching.strategies.random import RandomStrategy
from tests.toy import toy_cost_model

RATES = (0.5, 0.8)


@pytest.fixture
def problem():
    cost_model = toy_cost_model(6, 0)
    channels = cost_model.num_channels
    return cost_model, Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))


def make(problem, chosen):
    cost_model, budget = problem

    def go_on(weights):
        chosen.append(weights.tolist())
        return RandomStrategy(budget, RATES, 0)

    return PriorFirst(cost_model, budget, RATES, go_on, name="random")


def measure(proposals, favourite, first=0):
    return [
        (
            Candidate(first + i, p.rate, p.keep_counts),
            Measurement(first + i, 0.9 if p.keep_counts in favourite else 0.1, 0, 0, 10, 0.0),
        )
        for i, p in enumerate(proposals)
    ]


@pytest.mark.parametrize("prior", ["all", "inner"])
def test_the_better_prior_is_chosen_and_its_strategy_goes_on(problem, prior):
    cost_model, budget = problem
    priors = prior_weights(cost_model)
    if prior not in priors:
        pytest.fail("the toy problem needs residual and inner groups")
    favourite = {tuple(row) for row in uniform(budget, RATES, priors[prior]).tolist()}
    chosen = []
    strategy = make(problem, chosen)
    asked = strategy.ask(100)
    assert len(asked) == 4
    assert strategy.ask(100) == []
    strategy.tell(measure(asked[:3], favourite))
    assert strategy.prior is None
    strategy.tell(measure(asked[3:], favourite, 3))
    assert strategy.prior == prior
    assert chosen == [priors[prior].tolist()]
    assert len(strategy.ask(5)) == 5


def test_restored_before_and_after_the_choice(problem, tmp_path):
    strategy = make(problem, [])
    asked = strategy.ask(2)
    strategy.tell(measure(asked, set()))
    (tmp_path / "a").mkdir()
    strategy.save(tmp_path / "a")
    again = make(problem, [])
    again.restore(tmp_path / "a")
    rest = again.ask(10)
    assert rest == strategy.ask(10)
    assert not set(rest) & set(asked)
    again.tell(measure(rest, set(), 2))
    assert again.prior is not None
    (tmp_path / "b").mkdir()
    again.ask(3)
    again.save(tmp_path / "b")
    third = make(problem, [])
    third.restore(tmp_path / "b")
    assert third.prior == again.prior
    assert third.ask(4) == again.ask(4)


def test_without_residual_streams_there_is_one_prior():
    cost_model = toy_cost_model(3, 0)
    is_residual = np.array([group.is_residual for group in cost_model.groups])
    expected = {"all"} if not is_residual.any() or is_residual.all() else {"all", "inner"}
    assert set(prior_weights(cost_model)) == expected
