"""The hill climb mutates the best allocation told so far."""

import numpy as np

from cacp_ray.searching.allocation import AllocationSpace, uniform_prior
from cacp_ray.searching.strategies import offsets as offset_strategies
from cacp_ray.searching.strategies.hill_climb import MAX_MUTATED, SCALE, SPREAD
from tests.toy import measure_by_formula
from tests.unit.searching.test_strategies import make

RATE = 0.5


def wishes(num_proposals, told, score, monkeypatch):
    """(N, P) offsets drawn after `told` results were told, and the space."""
    strategy, budget = make("hill_climb", rates=(RATE,))
    strategy.tell(measure_by_formula(strategy.ask(told), score))
    asked = []
    decode = AllocationSpace.decode

    def record(self, rates, offsets):
        asked.append(offsets[0].copy())
        return decode(self, rates, offsets)

    monkeypatch.setattr(AllocationSpace, "decode", record)
    strategy.ask(num_proposals)
    return np.array(asked), AllocationSpace(budget, uniform_prior(8), SCALE)


def test_few_groups_of_the_parent_are_mutated(monkeypatch):
    monkeypatch.setattr(offset_strategies, "MAX_RETRIES", 0)  # retries are noisier
    offsets, _ = wishes(400, 1, lambda _: 0.5, monkeypatch)  # the parent is the prior: offset 0
    num_mutated = (offsets != 0).sum(axis=1)
    assert set(num_mutated) == set(range(1, MAX_MUTATED + 1))
    assert (offsets != 0).any(axis=0).all()
    np.testing.assert_allclose(SCALE * offsets[offsets != 0].std(), SPREAD, rtol=0.1)


def test_the_parent_is_the_best_told(monkeypatch):
    seen = {}

    def score(keep_counts):
        return seen.setdefault(keep_counts, 0.9 if len(seen) == 5 else 0.5)

    offsets, space = wishes(50, 12, score, monkeypatch)
    best = max(seen, key=lambda keep_counts: seen[keep_counts])
    parent = space.encode([RATE], [best])[0]
    assert np.abs(parent).max() > 0.01
    assert ((offsets == parent).sum(axis=1) >= space.num_offsets - MAX_MUTATED).all()


def test_only_a_strictly_better_allocation_replaces_the_parent(monkeypatch):
    told, space = wishes(50, 12, lambda _: 0.5, monkeypatch)
    assert ((told == 0).sum(axis=1) >= space.num_offsets - MAX_MUTATED).all()


def test_rates_climb_apart():
    def proposals_at_half(score_elsewhere):
        strategy, _ = make("hill_climb", rates=(RATE, 0.7))
        asked = strategy.ask(20)
        results = measure_by_formula(
            [p for p in asked if p.rate == RATE], lambda counts: counts[0] / 100
        )
        strategy.tell(
            results + measure_by_formula([p for p in asked if p.rate != RATE], score_elsewhere)
        )
        return [p for p in strategy.ask(1) if p.rate == RATE]

    up, down = (proposals_at_half(lambda counts, sign=sign: sign * counts[1]) for sign in (1, -1))
    assert up == down != []
