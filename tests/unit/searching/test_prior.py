"""The prior is chosen by measurement, and the choice survives a restart at any point."""

import numpy as np
import pytest

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.searching.allocation import Prior, uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts, uniform
from cacp_ray.searching.strategies.prior import MOST_WIDTHS, PriorFirst, uniform_priors
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.random import RandomStrategy
from tests.toy import measure_by_formula, toy_cost_model, toy_score

RATES = (0.5, 0.8)
COST_MODEL = toy_cost_model(6, 0)
CHANNELS = COST_MODEL.num_channels


class Listening(RandomStrategy):
    """Keeps the results it is told."""

    told = ()

    def tell(self, results):
        self.told = [*self.told, *results]


def make(chosen, evaluations=20):
    """20 evaluations are too few for a sensitivity map."""
    budget = Budget(COST_MODEL.macs, CHANNELS, minimum_counts(CHANNELS, 0.1, 1))
    problem = Problem(COST_MODEL, budget, RATES, 0, evaluations, uniform_prior(6))

    def go_on(prior):
        strategy = Listening(budget, RATES, 0)
        chosen.append((prior, strategy))
        return strategy

    return PriorFirst(problem, go_on, name="random"), budget


def favour(favourite):
    return lambda counts: 0.9 if counts in favourite else 0.1


@pytest.mark.parametrize("prior", ["all", "inner"])
def test_the_better_prior_is_chosen_and_its_strategy_goes_on(prior):
    priors = uniform_priors(COST_MODEL)
    assert set(priors) == {"all", "inner"}
    chosen = []
    strategy, budget = make(chosen)
    favourite = {tuple(row) for row in uniform(budget, RATES, priors[prior].weights).tolist()}
    asked = strategy.ask(100)
    assert len(asked) == 4
    assert strategy.ask(100) == []
    strategy.tell(measure_by_formula(asked[:3], favour(favourite)))
    assert strategy.prior is None
    strategy.tell(measure_by_formula(asked[3:], favour(favourite), 3))
    assert strategy.prior == prior
    ((best, inner),) = chosen
    assert (best.weights == priors[prior].weights).all()
    assert best.damage is None
    assert sorted(c.index for c, _ in inner.told) == [0, 1, 2, 3]
    assert len(strategy.ask(5)) == 5


def test_restored_at_any_point_it_goes_on_the_same(tmp_path):
    def run(stops):
        strategy, number, path = make([], 200)[0], 0, []
        for step in range(40):
            if step in stops:
                folder = tmp_path / f"{len(stops)}-{step}"
                folder.mkdir()
                strategy.save(folder)
                strategy = make([], 200)[0]
                strategy.restore(folder)
            asked = strategy.ask(3)
            path += asked
            strategy.tell(measure_by_formula(asked, toy_score(COST_MODEL), number))
            number += len(asked)
        return strategy.prior, path

    assert run({1, 5, 11, 12, 13, 20, 39}) == run(set()) == run(set(range(1, 40)))


def test_where_groups_differ_the_sensitivity_map_is_chosen():
    # The accuracy depends on one group, which only the map leaves whole.
    chosen = []
    strategy, budget = make(chosen, 300)
    results = []
    while strategy.prior is None:
        asked = strategy.ask(7)
        new = measure_by_formula(asked, lambda counts: counts[2] / CHANNELS[2], len(results))
        results += new
        strategy.tell(new)
    assert strategy.prior.startswith("map of")
    ((prior, inner),) = chosen
    counts = prior.allocate(budget, RATES)
    assert (counts[:, 2] == CHANNELS[2]).all()
    assert (budget.cost(counts) <= budget.limit(RATES)).all()
    probes = [candidate for candidate, _ in results if candidate.rate == 1]
    assert 6 < len(probes) <= 1 + 6 * MOST_WIDTHS
    assert {candidate.rate for candidate, _ in inner.told} == set(RATES)


def test_probes_that_are_told_late_do_not_reach_the_strategy():
    chosen = []
    strategy, _ = make(chosen)
    asked = strategy.ask(10)
    strategy.tell(measure_by_formula(asked, toy_score(COST_MODEL)))
    probe = Candidate(1.0, asked[0].keep_counts)
    strategy.tell(measure_by_formula([probe], toy_score(COST_MODEL), 9))
    assert 9 not in {candidate.index for candidate, _ in chosen[0][1].told}


def test_without_residual_streams_there_is_one_uniform_prior():
    cost_model = toy_cost_model(3, 0)
    is_residual = np.array([group.is_residual for group in cost_model.groups])
    expected = {"all"} if not is_residual.any() or is_residual.all() else {"all", "inner"}
    assert set(uniform_priors(cost_model)) == expected


def test_a_damage_map_cuts_most_where_least_is_lost():
    budget = make([])[1]
    damage = [np.full(n, 1.0 + (g == 4)) - np.arange(n) / (2 * n) for g, n in enumerate(CHANNELS)]
    counts = Prior(np.ones(6, bool), damage).allocate(budget, [0.5])[0]
    assert (counts / CHANNELS).argmax() == 4
    assert counts[4] == CHANNELS[4]
