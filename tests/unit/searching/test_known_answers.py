"""Every strategy against an answer found by other means: by hand, or by trying all allocations."""

import functools

import numpy as np
import pytest

from cacp_ray.evaluation.measurement import LocalEvaluator
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.strategies import STRATEGIES
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.table import make_strategy
from tests.small import measurement_of, mostly_slow
from tests.toy import every_allocation, measure_by_formula, toy_cost_model, toy_score

RATES = (0.3, 0.5, 0.7)
LEARNING = ("hill_climb", "cem", "evolution", "optuna")
FAST = ("hill_climb", "pcp", "greedy")

# Costs of a channel in three groups.
COSTS = np.array([1, 2, 5])
ALIKE = np.array([1, 1, 1])


def linear_problem(widths, costs=ALIKE, rates=RATES, scores=None, evaluations=300):
    """A network whose cost is the sum of the costs of its channels."""
    channels = np.array(widths)
    budget = Budget(lambda counts: (counts * costs).sum(-1), channels, np.ones(3, np.int64))
    given = {} if scores is None else {"scores": lambda name: scores[name]}
    return Problem(
        toy_cost_model(3), budget, rates, 0, evaluations, uniform_prior(3), **given
    )  # strategies read the cost model for residual streams alone


def search(name, given, score=lambda counts: 0.5, size=6):
    """Proposals of a strategy in the order asked, at most its evaluations."""
    strategy, proposals = make_strategy(name, given), []
    while asked := strategy.ask(min(size, given.evaluations - len(proposals))):
        strategy.tell(measure_by_formula(asked, score, len(proposals)))
        proposals += asked
    return proposals


def best_score(proposals, given, score):
    """(R,) best score of the proposals within the budget of each rate."""
    counts = np.array([proposal.keep_counts for proposal in proposals])
    tops = np.array([score(proposal.keep_counts) for proposal in proposals])
    costs = given.budget.cost(counts)
    return np.array([tops[costs <= limit].max() for limit in given.budget.limit(given.rates)])


def optimum(given, values):
    """(R, G) allocations with the highest of `values` (N,) within the budget of each rate."""
    tried = every_allocation(given.budget)
    costs = given.budget.cost(tried)
    limits = given.budget.limit(given.rates)
    return np.array([tried[np.where(costs <= limit, values, -np.inf).argmax()] for limit in limits])


@functools.cache
def six_groups(seed):
    """A toy network of some ten thousand allocations, its accuracy, and the best of them.

    The accuracy is a sum over groups, so tables of single groups give that of all allocations.
    """
    cost_model, score = toy_cost_model(6, seed), toy_score(toy_cost_model(6, seed), seed)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 4), round_to=4)
    given = Problem(cost_model, budget, RATES, seed, 180, uniform_prior(6))
    tried = every_allocation(budget)
    top1 = np.ones(len(tried))
    for group, whole in enumerate(channels):
        alone = np.tile(channels, (whole + 1, 1))
        alone[:, group] = np.arange(whole + 1)
        lost = np.array([1 - score(tuple(row)) for row in alone])
        top1 -= lost[tried[:, group]]
    return given, score, optimum(given, top1)


def share_of_optimum(name, num_seeds=4):
    """Gain over the uniform allocation, as a share of the optimum's; mean over rates and seeds."""
    shares = []
    for seed in range(num_seeds):
        given, score, best = six_groups(seed)
        best = np.array([score(tuple(row)) for row in best])
        prior = [score(tuple(row)) for row in given.prior.allocate(given.budget, RATES)]
        top1 = best_score(search(name, given, score), given, score)
        assert (top1 <= best + 1e-12).all()
        shares.append((top1 - prior) / (best - prior))
    return np.mean(shares)


@pytest.mark.parametrize("name", mostly_slow([*LEARNING, "pcp", "greedy"], FAST))
def test_nearly_all_of_the_way_from_uniform_to_the_optimum_is_found(name):
    num_seeds = 1 if name == "optuna" else 4  # it takes half a minute for four
    assert share_of_optimum(name, num_seeds) >= 0.975


def test_cap_finds_three_quarters_of_it():
    assert share_of_optimum("cap") >= 0.75


@pytest.mark.parametrize("name", mostly_slow(["noise", "random"], ["random"]))
def test_what_learns_nothing_finds_less_of_it(name):
    assert share_of_optimum(name) <= 0.95


@pytest.mark.parametrize("name", ["greedy", "pcp"])
def test_a_descent_channel_by_channel_ends_at_the_optimum(name):
    """Every channel of a group loses more than the one before, and all cost the same."""
    given = linear_problem((8, 8, 8))
    weights = np.array([0.05, 0.2, 0.6])

    def score(counts):
        return 1 - (1 - np.array(counts) / 8) ** 2 @ weights  # (...)

    top1 = best_score(search(name, given, score), given, score)
    best = score(optimum(given, score(every_allocation(given.budget))))
    assert top1 == pytest.approx(best, abs=1e-12)


def test_sensitivity_ends_where_the_worst_damage_is_the_least_of_all_allocations():
    # Seven widths of eight channels are all of them: nothing is interpolated.
    given = linear_problem((8, 8, 8), COSTS)
    weights = np.array([0.05, 0.2, 0.6])

    def damage(counts):
        return weights * (1 - np.array(counts) / 8) ** 2  # (..., G)

    proposals = search("sensitivity", given, lambda counts: 1 - damage(counts).sum())
    tried = every_allocation(given.budget)
    expected = damage(optimum(given, -damage(tried).max(1))).max(1)
    for rate, least in zip(RATES, expected, strict=True):
        damages = [damage(p.keep_counts).max() for p in proposals if p.rate == rate]
        assert min(damages) == pytest.approx(least)


def test_cap_tolerates_the_same_loss_in_every_group():
    """Worked out by hand: a group loses `w (1 - K / 16)`, a third of the loss allowed in the pass.

    That is 0.05 for 8, 12 and 14 channels of 16, and 0.075 for 4, 10 and 13.
    """
    rates = (27 / 48 + 1e-9, 34 / 48 + 1e-9)
    given = linear_problem((16, 16, 16), rates=rates)
    weights = np.array([0.1, 0.2, 0.4])
    proposals = search("cap", given, lambda counts: 1 - weights @ (1 - np.array(counts) / 16))
    # A pass ends with the last allocation that it has measured, or with one of the last.
    assert {(4, 10, 13), (8, 12, 14)} <= {proposal.keep_counts for proposal in proposals}


SCORES = {
    # Scores fall, as channels stand in importance order; those of the second group are larger.
    "": [
        np.array([0.95, 0.71, 0.62, 0.33, 0.21, 0.04]),
        np.array([9.1, 8.3, 2.2, 1.7, 0.8, 0.3, 0.2, 0.1]),
        np.array([1.9, 1.8, 1.6, 0.9, 0.05]),
    ],
    "cpmc": [
        np.array([0.50, 0.41, 0.39, 0.37, 0.32, 0.31]),
        np.array([0.91, 0.52, 0.34, 0.12, 0.08, 0.03, 0.02, 0.01]),
        np.array([0.64, 0.33, 0.16, 0.09, 0.05]),
    ],
}


def kept_score(scores, counts):
    """(N,) sum of the scores of kept channels, from keep counts (N, G)."""
    sums = [np.concatenate([[0.0], np.cumsum(score)]) for score in scores]
    return sum(total[counts[:, group]] for group, total in enumerate(sums))


def test_cpmc_keeps_the_channels_with_the_highest_total_of_its_own_scores():
    """All channels cost the same, so the best of all allocations is known exactly."""
    given = linear_problem((6, 8, 5), scores=SCORES)
    proposals = search("cpmc", given)
    tried = every_allocation(given.budget)
    expected = optimum(given, kept_score(SCORES["cpmc"], tried))
    assert (expected != optimum(given, kept_score(SCORES[""], tried))).any()
    for order in ("cpmc", ""):
        counts = [list(p.keep_counts) for p in proposals if p.criterion == order]
        assert counts == expected.tolist()


def test_global_keeps_the_channels_with_the_highest_total_raw_and_normalised():
    given = linear_problem((6, 8, 5), scores=SCORES)
    counts = np.array([proposal.keep_counts for proposal in search("global", given)])
    tried = every_allocation(given.budget)
    normalised = [score / np.sqrt((score**2).sum()) for score in SCORES[""]]
    readings = (SCORES[""], normalised)
    answers = [optimum(given, kept_score(scores, tried)) for scores in readings]
    assert (answers[0] != answers[1]).any()
    # With equal costs the three powers give one answer, which is asked once.
    rows = {tuple(row) for answer in answers for row in answer.tolist()}
    assert {tuple(row) for row in counts.tolist()} == rows


def test_global_divides_by_the_cost_that_a_channel_frees():
    """The kept total is less than one channel short of the fractional knapsack's."""
    rng = np.random.default_rng(0)
    # The third group has the highest scores, but not for what its channels cost.
    scores = [scale * np.sort(rng.random(20))[::-1] for scale in (1, 1, 1.5)]
    given = linear_problem((20, 20, 20), COSTS, scores={"": scores})
    tried = every_allocation(given.budget)
    best = kept_score(scores, optimum(given, kept_score(scores, tried)))
    proposals = search("global", given)
    for rate, most in zip(RATES, best, strict=True):
        counts = np.array([p.keep_counts for p in proposals if p.rate == rate])
        assert kept_score(scores, counts).max() > most - scores[2].max()


def test_adapruner_widths_are_one_factor_times_the_mean_scale():
    """By hand: mean scales 1, 1/2 and 1/4 of ten channels each.

    The factor 0.8 gives 8, 4 and 2 of 30 channels; 1.2 gives 12, of which there are 10, 6 and 3.
    """
    scales = {"bn_scale": [np.linspace(1.2, 0.8, 10) / part for part in (1, 2, 4)]}
    given = linear_problem((10, 10, 10), rates=(14 / 30 + 1e-9, 19 / 30 + 1e-9), scores=scales)
    proposals = search("adapruner", given)
    assert {p.keep_counts for p in proposals if p.rate == given.rates[0]} == {(8, 4, 2)}
    assert {p.keep_counts for p in proposals if p.rate == given.rates[1]} == {(10, 6, 3)}


@pytest.mark.parametrize(
    ("name", "orders"),
    [("adapruner", ("", "l1", "l2", "fpgm", "bn_scale")), ("cpmc", ("cpmc", ""))],
)
def test_the_order_that_measures_best_is_delivered(name, orders, tmp_path):
    cost_model = toy_cost_model(3)
    channels = cost_model.num_channels
    budget = Budget(cost_model.macs, channels, minimum_counts(channels, 0.1, 1))
    rng = np.random.default_rng(0)
    scores = [np.sort(rng.random(number))[::-1] for number in channels]
    given = Problem(
        cost_model, budget, RATES, 0, 30, uniform_prior(3), scores=lambda criterion: scores
    )
    for winner in orders:

        def score(candidate, winner=winner):
            top1 = 0.8 if candidate.criterion == winner else 0.7
            return measurement_of(candidate.index, top1, 0.0, 1 - top1, 100, 0.1)

        loop = SearchLoop(
            LocalEvaluator(score),
            cost_model,
            RunDirectory(tmp_path / f"{name}-{winner}"),
            rates=RATES,
            evaluations=30,
        )
        loop.run(make_strategy(name, given))
        assert {loop.archive.best(rate).criterion for rate in RATES} == {winner}


def test_uniform_keeps_the_same_share_of_every_group():
    # By hand; the first of three groups in a chain of the toy is a residual stream.
    given = linear_problem((10, 20, 30), rates=(0.5, 0.7))
    counts = [proposal.keep_counts for proposal in search("uniform", given)]
    assert counts == [(5, 10, 15), (10, 8, 12), (7, 14, 21), (10, 13, 19)]


def test_random_spends_every_budget_to_the_last_channel():
    given = linear_problem((10, 20, 30))
    for proposal in search("random", given):
        assert sum(proposal.keep_counts) == {0.3: 18, 0.5: 30, 0.7: 42}[proposal.rate]


def test_no_strategy_is_left_out():
    by_hand = {"uniform", "random", "noise", "sensitivity", "cpmc", "global", "adapruner"}
    assert {*LEARNING, "pcp", "greedy", "cap", *by_hand} == {*STRATEGIES}
