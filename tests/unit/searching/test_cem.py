"""The cross-entropy method moves each rate's Gaussian to the best of every 15 measurements."""

import numpy as np
import pytest

from cacp_ray.io.files import read_json
from cacp_ray.searching.allocation import AllocationSpace, uniform_prior
from cacp_ray.searching.strategies.cem import ELITE, POPULATION, SCALE, Gaussian, refit
from tests.toy import measure_by_formula
from tests.unit.searching.test_strategies import SCORE, make

RATE = 0.5


def state_of(strategy, folder):
    """Mean (P,), variance (P,) and size of the open generation of the only rate."""
    strategy.save(folder)
    [(rate, mean, variance, generation)] = read_json(folder / "state.json")["memory"]
    assert rate == RATE
    return np.array(mean), np.array(variance), len(generation)


def first_channels(keep_counts):
    return keep_counts[0] / 100


def test_an_update_worked_out_by_hand():
    old = Gaussian(np.array([1.0, 0.0]), np.array([0.5, 0.1]))
    new = refit(old, np.array([[0.0, 2.0], [2.0, 2.0], [0.0, 4.0], [2.0, 4.0]]))
    np.testing.assert_allclose(new.mean, [0.2 * 1 + 0.8 * 1, 0.8 * 3])
    added = 0.02**2 / 0.8**2
    np.testing.assert_allclose(new.variance, [0.1 + 0.8 + added, 0.02 + 0.8 + added])


def test_the_elite_of_a_full_generation_moves_the_mean(tmp_path):
    strategy, budget = make("cem", rates=(RATE,))
    results = measure_by_formula(strategy.ask(POPULATION), first_channels)
    strategy.tell(results[:-1])
    mean, variance, num_open = state_of(strategy, tmp_path)
    assert (mean == 0).all()
    np.testing.assert_allclose(variance, (0.25 / 0.8) ** 2)
    assert num_open == POPULATION - 1

    strategy.tell(results[-1:])
    mean, _, num_open = state_of(strategy, tmp_path)
    assert num_open == 0
    results.sort(key=lambda result: -result[1].score)
    elite = [candidate.keep_counts for candidate, _ in results[:ELITE]]
    offsets = AllocationSpace(budget, uniform_prior(8), SCALE).encode([RATE] * ELITE, elite)
    np.testing.assert_allclose(mean, 0.8 * offsets.mean(axis=0), rtol=1e-5)
    assert mean[0] > 0


def test_late_measurements_count_for_the_next_generation(tmp_path):
    strategy, _ = make("cem", rates=(RATE,))
    results = measure_by_formula(strategy.ask(2 * POPULATION + 3), first_channels)
    strategy.tell(results)
    assert state_of(strategy, tmp_path)[2] == 3


def test_no_group_freezes(tmp_path):
    strategy, _ = make("cem", rates=(RATE,))
    best = measure_by_formula(strategy.ask(1), SCORE)
    for _ in range(30 * POPULATION):
        strategy.tell(best)
    mean, variance, _ = state_of(strategy, tmp_path)
    assert (mean == 0).all()
    np.testing.assert_allclose(variance, (0.02 / 0.8) ** 2 / 0.8, rtol=1e-3)


@pytest.mark.parametrize(("name", "is_learning"), [("cem", True), ("noise", False)])
def test_only_noise_never_updates(name, is_learning):
    told, untold = make(name)[0], make(name)[0]
    told.tell(measure_by_formula(told.ask(60), first_channels))
    untold.ask(60)
    assert (told.ask(9) != untold.ask(9)) == is_learning
    assert told.name == name
