"""Strategies that need no Ray: laws for all of them, and random and uniform allocations."""

import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.errors import ConfigError
from cacp_ray.searching.allocation import Prior, uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts, uniform
from cacp_ray.searching.strategies import STRATEGIES
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.table import MAKERS, make_strategy
from tests.toy import measure_by_formula, toy_cost_model, toy_score, toy_scores

RATES = (0.3, 0.5, 0.7)
SCORE = toy_score(toy_cost_model())
AROUND_PRIOR = ("hill_climb", "cem", "noise", "evolution", "optuna")


def toy_budget(cost_model, round_to=1):
    channels = cost_model.num_channels
    return Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, round_to), round_to)


def problem(cost_model, seed=0, round_to=1, rates=RATES, prior=None):
    budget = toy_budget(cost_model, round_to)
    prior = uniform_prior(len(budget.num_channels)) if prior is None else prior
    return Problem(cost_model, budget, rates, seed, 300, prior, scores=toy_scores(cost_model))


def make(name, seed=0, num_groups=8, round_to=1, rates=RATES, prior=None):
    given = problem(toy_cost_model(num_groups), seed, round_to, rates, prior)
    return make_strategy(name, given), given.budget


def drive(strategy, steps, seed=0, score=SCORE, out=()):
    """Asks and tells: results come late, in random order, and one in eight fails.

    Returns all proposals, and the results that are still out at the end.
    """
    rng = np.random.default_rng(seed)
    proposals, out = [], list(out)
    for step in range(steps):
        asked = strategy.ask(1 + step % 3)
        proposals += asked
        status = "failed" if rng.random() < 1 / 8 else "ok"
        out += measure_by_formula(asked, score, len(proposals), status)
        rng.shuffle(out)
        num_late = rng.integers(0, 7)
        strategy.tell(out[num_late:])
        del out[num_late:]
    return proposals, out


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(sorted(STRATEGIES)), st.integers(0, 99), st.sampled_from([1, 4]))
def test_every_proposal_is_legal_and_spends_its_budget(name, seed, round_to):
    strategy, budget = make(name, seed, round_to=round_to)
    for proposal in drive(strategy, 9, seed)[0]:
        counts = np.array(proposal.keep_counts)
        limit = budget.limit(proposal.rate)
        assert budget.cost(counts) <= limit
        assert (counts >= budget.min_counts).all()
        assert ((counts % round_to == 0) | (counts == budget.num_channels)).all()
        if proposal.rate == 1:
            continue  # a probe
        grown = np.minimum(counts // round_to * round_to + round_to, budget.num_channels)
        steps = np.where(np.eye(len(counts), dtype=bool), grown, counts)
        assert ((budget.cost(steps) > limit) | (counts == budget.num_channels)).all()


def test_random_proposals_depend_on_seed_and_number_alone():
    one, _ = make("random", seed=3)
    other, _ = make("random", seed=3)
    together = one.ask(10)
    assert [proposal for size in (1, 4, 5) for proposal in other.ask(size)] == together
    assert make("random", seed=4)[0].ask(10) != together


def test_random_serves_all_rates_equally_and_repeats_little():
    strategy, _ = make("random")
    proposals = strategy.ask(300)
    assert [p.rate for p in proposals[:6]] == [*RATES, *RATES]
    assert len({p.keep_counts for p in proposals}) > 250


def test_random_widths_favour_no_group():
    strategy, budget = make("random", rates=(0.5,))
    counts = np.array([p.keep_counts for p in strategy.ask(500)])
    ratios = (counts / budget.num_channels).mean(axis=0)
    # The rest of the budget at the end only buys channels of cheap groups.
    assert ratios.max() - ratios.min() < 0.15


def test_uniform_has_two_candidates_a_rate_and_then_ends():
    strategy, _ = make("uniform")
    cost_model = toy_cost_model()
    is_residual = np.array([group.is_residual for group in cost_model.groups])
    proposals = strategy.ask(4) + strategy.ask(4)
    assert [p.rate for p in proposals] == [0.3, 0.3, 0.5, 0.5, 0.7, 0.7]
    assert strategy.ask(1) == []
    ratios = np.array(proposals[-2].keep_counts) / cost_model.num_channels
    assert ratios.max() - ratios.min() < 0.15
    inner = np.array(proposals[-1].keep_counts)
    assert (inner == cost_model.num_channels)[is_residual].all()


def test_every_name_is_made_and_every_strategy_has_a_name():
    assert set(STRATEGIES) == set(MAKERS)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("steps", [2, 40])
def test_a_restored_strategy_goes_on_where_it_was(name, steps, tmp_path):
    strategy, _ = make(name, seed=5)
    _, out = drive(strategy, steps)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    strategy.save(one)
    other, _ = make(name, seed=6)
    other.restore(one)
    other.save(two)
    assert (one / "state.json").read_text() == (two / "state.json").read_text()
    assert drive(other, 25, 1, out=out) == drive(strategy, 25, 1, out=out)


@pytest.mark.parametrize("name", AROUND_PRIOR)
@pytest.mark.parametrize("inner", [False, True])
def test_the_prior_comes_first_at_every_rate(name, inner):
    weights = np.array([not (inner and group.is_residual) for group in toy_cost_model().groups])
    strategy, budget = make(name, rates=(0.7, 0.4), prior=Prior(weights))
    proposals = strategy.ask(5)
    assert [p.rate for p in proposals] == [0.4, 0.7, 0.4, 0.7, 0.4]
    assert [list(p.keep_counts) for p in proposals[:2]] == uniform(
        budget, [0.4, 0.7], weights
    ).tolist()


@pytest.mark.parametrize("name", AROUND_PRIOR)
def test_the_rate_with_the_fewest_proposals_is_served_first(name):
    elsewhere = [p for p in make(name, seed=9)[0].ask(9) if p.rate == 0.3]
    strategy, _ = make(name)
    strategy.tell(
        measure_by_formula(elsewhere[:2], SCORE)
    )  # from an earlier session; the first is the prior
    proposals = strategy.ask(5)
    assert [p.rate for p in proposals] == [0.5, 0.7, 0.5, 0.7, 0.3]
    assert proposals[-1].keep_counts not in {p.keep_counts for p in elsewhere[:2]}


@pytest.mark.parametrize("name", AROUND_PRIOR)
def test_proposals_do_not_repeat(name):
    strategy, _ = make(name)
    proposals, _ = drive(strategy, 100)
    assert len(set(proposals)) == len(proposals) == 199


@pytest.mark.parametrize("name", AROUND_PRIOR)
def test_a_strategy_goes_on_when_all_keep_counts_are_known(name):
    strategy, budget = make(name, rates=(1.0,))
    whole = tuple(budget.num_channels.tolist())
    assert {p.keep_counts for p in drive(strategy, 20)[0]} == {whole}


@pytest.mark.parametrize("name", ["random", *AROUND_PRIOR])
def test_proposals_do_not_depend_on_how_many_are_asked_at_once(name):
    together = make(name)[0].ask(10)
    strategy, _ = make(name)
    assert [p for size in (1, 4, 5) for p in strategy.ask(size)] == together
    assert make(name, seed=1)[0].ask(10) != together


@pytest.mark.parametrize("name", AROUND_PRIOR)
def test_failures_teach_nothing(name):
    told, untold = make(name)[0], make(name)[0]
    results = measure_by_formula(told.ask(60), lambda counts: counts[0] / 100, status="failed")
    untold.ask(60)
    told.tell(results)
    assert told.ask(6) == untold.ask(6)


# Optuna's sampler weighs trials by their age, so optuna is left out.
@pytest.mark.parametrize("name", ["hill_climb", "cem", "noise", "evolution"])
def test_a_generation_may_be_told_in_any_order(name):
    one, other = make(name)[0], make(name)[0]
    results = measure_by_formula(one.ask(45), SCORE)  # 15 a rate
    other.ask(45)
    one.tell(results)
    np.random.default_rng(0).shuffle(results)
    for result in results:
        other.tell([result])
    assert one.ask(6) == other.ask(6)


@functools.cache
@functools.cache
def best_found(name, seed):
    """Mean over rates of the best score of 300 evaluations of a problem with 12 groups."""
    cost_model = toy_cost_model(12, seed)
    score = toy_score(cost_model, seed)
    strategy = make_strategy(name, problem(cost_model, seed))
    best = dict.fromkeys(RATES, 0.0)
    for _ in range(60):
        results = measure_by_formula(strategy.ask(5), score)
        strategy.tell(results)
        for candidate, measured in results:
            best[candidate.rate] = max(best[candidate.rate], measured.score)
    return np.mean(list(best.values()))


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("hill_climb", "random"),
        ("cem", "noise"),
        *(
            pytest.param(*pair, marks=pytest.mark.slow)
            for pair in itertools.product(
                ("hill_climb", "cem", "evolution", "optuna"), ("random", "noise")
            )
            if pair not in {("hill_climb", "random"), ("cem", "noise")}
        ),
    ],
)
def test_learning_finds_more_with_the_same_evaluations(better, worse):
    gains = [best_found(better, seed) - best_found(worse, seed) for seed in range(4)]
    assert np.mean(gains) > 0.005
    assert np.sum(np.array(gains) > 0) >= 3


def test_an_unknown_name_offers_the_nearest():
    with pytest.raises(ConfigError, match="did you mean uniform"):
        make("unifrom")
