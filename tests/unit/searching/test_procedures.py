"""Strategies that go by steps, on formula evaluators whose answer is known."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cacp_ray.errors import ConfigError
from cacp_ray.evaluation.measurement import Candidate, LocalEvaluator
from cacp_ray.rundir.directory import RunDirectory
from cacp_ray.searching.allocation import uniform_prior
from cacp_ray.searching.budget import Budget, minimum_counts, scale_to_budget, spend, uniform
from cacp_ray.searching.loop import SearchLoop
from cacp_ray.searching.ranking import cut_at_threshold
from cacp_ray.searching.strategies import cap
from cacp_ray.searching.strategies.cap import one_pass
from cacp_ray.searching.strategies.descent import plan_targets, shrink
from cacp_ray.searching.strategies.problem import Problem
from cacp_ray.searching.strategies.procedure import Procedure, together
from cacp_ray.searching.strategies.table import make_strategy
from tests.small import measurement_of
from tests.toy import measure_by_formula, toy_cost_model, toy_score, toy_scores

RATES = (0.3, 0.5, 0.7)
COST_MODEL = toy_cost_model(8)
CHANNELS = COST_MODEL.num_channels
SCORE = toy_score(COST_MODEL)
BY_STEPS = ("pcp", "greedy", "cap", "sensitivity", "global", "cpmc", "adapruner")


def problem(evaluations=300, rates=RATES, round_to=1, floor=0.1):
    budget = Budget(COST_MODEL.macs, CHANNELS, minimum_counts(CHANNELS, floor, round_to), round_to)
    scores = toy_scores(COST_MODEL)
    return Problem(COST_MODEL, budget, rates, 0, evaluations, uniform_prior(8), scores=scores)


def search(name, score=SCORE, size=1000, **changes):
    """Every result of a strategy that is asked for `size` candidates at once, in order."""
    given = problem(**changes)
    strategy = make_strategy(name, given)
    results, rng = [], np.random.default_rng(size)
    while proposals := strategy.ask(min(size, given.evaluations - len(results))):
        new = measure_by_formula(proposals, score, len(results))
        results += new
        rng.shuffle(new)
        strategy.tell(new)
    return results


def delivered(results, rates=RATES):
    """Best keep counts within the budget of every rate, as a run's archive finds them."""
    limits = problem().budget.limit(rates)
    best = {}
    for candidate, measurement in results:
        cost = COST_MODEL.macs(candidate.keep_counts)
        for rate, limit in zip(rates, limits, strict=True):
            if cost <= limit and measurement.score > best.get(rate, (-1.0,))[0]:
                best[rate] = measurement.score, np.array(candidate.keep_counts)
    return {rate: counts for rate, (_, counts) in sorted(best.items())}


def only(*groups):
    """Accuracy that falls with the channels of some groups alone."""

    def score(counts):
        return float(np.mean([counts[group] / CHANNELS[group] for group in groups]))

    return score


@pytest.mark.parametrize("name", BY_STEPS)
@pytest.mark.parametrize("round_to", [1, 4])
def test_every_rate_is_delivered_within_the_evaluations(name, round_to):
    results = search(name, round_to=round_to)
    assert sorted(delivered(results)) == list(RATES)
    assert len({candidate.key for candidate, _ in results}) <= 300


@pytest.mark.parametrize("name", BY_STEPS)
def test_measured_side_by_side_or_one_by_one_gives_the_same(name):
    one_by_one = search(name, size=1)
    for size in (6, 1000):
        assert {c.key for c, _ in search(name, size=size)} == {c.key for c, _ in one_by_one}


@pytest.mark.parametrize("name", ["pcp", "greedy", "cap", "sensitivity"])
@pytest.mark.parametrize("group", [0, 3, 7])
def test_the_one_group_that_matters_stays_whole(name, group):
    # From 0.5 on the others can pay for the whole cut.
    counts = delivered(search(name, only(group)))
    for rate in (0.5, 0.7):
        assert counts[rate][group] == CHANNELS[group]


@pytest.mark.parametrize(("name", "share"), [("pcp", 1.0), ("greedy", 1.0), ("sensitivity", 0.9)])
def test_what_was_learned_beats_cuts_at_random(name, share):
    counts = delivered(search(name))
    for rate in RATES:
        blind = [measured.score for c, measured in search("random") if c.rate == rate]
        assert SCORE(counts[rate]) > np.quantile(blind, share)


def test_sensitivity_leaves_the_same_damage_in_every_group():
    sensitivities = np.array(
        [1 - SCORE(np.where(np.arange(8) == g, 0, CHANNELS)) for g in range(8)]
    )
    counts = delivered(search("sensitivity"))[0.5]
    damage = sensitivities * (1 - counts / CHANNELS) ** 2
    one_channel = sensitivities * (1 - (counts - 1) / CHANNELS) ** 2 - damage
    is_cut = counts < CHANNELS
    # The damage is as equal as whole channels and a map of seven widths allow.
    assert (damage[is_cut].max() - damage[is_cut]).max() < 3 * one_channel[is_cut].max()
    assert np.ptp(damage[is_cut]) < 0.5 * np.ptp(sensitivities * 0.25)


def test_a_pass_of_cap_ends_at_the_smallest_network_that_is_tolerated():
    # Accuracy falls alike with every channel of group 0 and with no other channel. At the end of
    # the forward order all other groups are at their smallest, to the precision of the bisection.
    budget = problem().budget

    def run(steps):
        measurements = None
        while True:
            try:
                (proposal,) = steps.send(measurements)
            except StopIteration as end:
                return end.value
            measurements = [measurement_of(0, only(0)(proposal.keep_counts), 0.0, 0.0, 1, 0.0)]

    counts = run(one_pass(problem(), 1.0, 0.2))
    assert (counts[1:] - budget.min_counts[1:] <= CHANNELS[1:] / 16 + 1).all()
    # Group 0, the first of eight, may lose an eighth of the way from 1 to 0.2.
    assert 0.9 * CHANNELS[0] <= counts[0] < 0.9 * CHANNELS[0] + CHANNELS[0] / 16 + 1


def test_a_pass_of_cap_serves_every_rate_that_it_ends_near_to(monkeypatch):
    budget = problem().budget
    ends = [CHANNELS // 3, CHANNELS // 2]
    shares = [int(budget.cost(counts)) / budget.total for counts in ends]
    # The smaller rate's own pass ends far below it, the other's just above.
    rates = (round(shares[1] - 0.005, 4), 0.9)
    passes = iter(ends)

    def one_pass(*_):
        yield [Candidate(1.0, tuple(CHANNELS.tolist()))]
        return next(passes, CHANNELS)

    monkeypatch.setattr(cap, "one_pass", one_pass)
    asked = [c for c, _ in search("cap", rates=rates) if c.rate == rates[0]]
    expected = spend(
        budget, scale_to_budget(budget, (ends[1] / CHANNELS)[None], rates[:1]), rates[:1]
    )
    assert tuple(expected[0].tolist()) in {c.keep_counts for c in asked}
    assert shares[0] < rates[0] - 0.05


@given(st.lists(st.integers(5, 100), min_size=1, max_size=5, unique=True), st.integers(0, 40))
def test_targets_pass_through_every_rate_and_never_rise(percent, extra):
    rates = np.array(percent) / 100
    targets = plan_targets(rates, len(rates) + extra)
    kept = [target.cost_kept for target in targets]
    assert len(targets) == len(rates) + extra
    assert kept == sorted(kept, reverse=True)
    assert set(rates) <= {target.cost_kept for target in targets if target.is_rate}
    assert all(target.is_rate == (target.cost_kept in rates) for target in targets if kept != 1)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.1, 1), st.integers(0, 99))
def test_shrinking_fits_and_takes_no_step_too_many(kept, seed):
    budget = problem().budget
    rng = np.random.default_rng(seed)
    steps = rng.uniform(0, 1, 8) * CHANNELS
    counts = shrink(budget, CHANNELS, steps, max(kept, 0.02 + budget.smallest / budget.total))
    assert budget.cost(counts) <= budget.limit(max(kept, 0.02 + budget.smallest / budget.total))
    assert (counts <= CHANNELS).all()
    assert (counts >= budget.min_counts).all()


def test_nothing_is_taken_from_a_network_that_fits_already():
    budget = problem().budget
    counts = budget.num_channels // 2
    kept = int(budget.cost(counts)) / budget.total + 1e-9
    assert (shrink(budget, counts, CHANNELS / 2, kept) == counts).all()


def test_a_threshold_keeps_what_is_above_it():
    # Half of every group is important; at the cost of half of all channels exactly these stay.
    scores = [
        np.where(np.arange(n) < n // 2, 2.0, 1.0) + np.arange(n)[::-1] / 1e3 for n in CHANNELS
    ]
    budget = problem().budget
    half = CHANNELS // 2
    rate = float(np.ceil(1e6 * budget.cost(half) / budget.total) / 1e6)
    assert (cut_at_threshold(budget, scores, [rate])[0] == half).all()


def test_adapruner_widths_follow_the_mean_scale():
    counts = delivered(search("adapruner"))[0.3]
    scales = np.array([score.mean() for score in toy_scores(COST_MODEL)("bn_scale")])
    inner = (counts > problem().budget.min_counts) & (counts < CHANNELS)
    ratios = (counts / CHANNELS / scales)[inner]
    assert inner.sum() >= 3
    assert ratios.max() / ratios.min() < 1.35  # whole channels of narrow groups
    assert len({c.criterion for c, _ in search("adapruner")}) == 5


@pytest.mark.parametrize("name", ["pcp", "cap"])
@pytest.mark.parametrize("mode", ["rounds", "async"])
def test_a_kill_at_any_point_changes_nothing(name, mode, tmp_path):
    def loop(folder, stop_after=None):
        left = itertools.count()

        def score(candidate):
            if next(left) == stop_after:
                raise KeyboardInterrupt
            score = SCORE(candidate.keep_counts)
            return measurement_of(candidate.index, score, 0.0, 1 - score, 100, 0.1)

        return SearchLoop(
            LocalEvaluator(score),
            COST_MODEL,
            RunDirectory(folder),
            rates=RATES,
            evaluations=120,
            mode=mode,
            checkpoint_ticks=7,
        )

    def rows(folder):
        return [(r.rate, r.keep_counts, r.score) for r in RunDirectory(folder).read_records()]

    loop(tmp_path / "whole").run(make_strategy(name, problem(120)))
    for stop_after in (3, 29, 41, None):
        strategy = make_strategy(name, problem(120))
        try:
            loop(tmp_path / "killed", stop_after).run(strategy)
        except KeyboardInterrupt:
            continue
    # Async may record a repeat twice, but asks for the same candidates.
    assert set(rows(tmp_path / "killed")) == set(rows(tmp_path / "whole"))
    assert len(rows(tmp_path / "whole")) > 60


@pytest.mark.parametrize("name", sorted({*BY_STEPS} - {"cap"}))
def test_too_few_evaluations_are_refused_with_the_number_that_is_enough(name):
    with pytest.raises(ConfigError, match=r"raise evaluations to (at least )?(\d+)") as caught:
        search(name, evaluations=5)
    enough = int("".join(filter(str.isdigit, str(caught.value).split("raise evaluations to")[1])))
    with pytest.raises(ConfigError):
        search(name, evaluations=enough - 1)
    results = search(name, evaluations=enough)
    assert sorted(delivered(results)) == list(RATES)
    assert len({candidate.key for candidate, _ in results}) <= enough


@pytest.mark.parametrize("evaluations", [9, 40, 70])
def test_cap_names_the_rates_that_it_leaves_uniform(evaluations, caplog):
    results = search("cap", evaluations=evaluations)
    assert len({candidate.key for candidate, _ in results}) <= evaluations
    budget = problem().budget
    even = dict(zip(RATES, uniform(budget, RATES, np.ones(8)).tolist(), strict=True))
    answers = {c.rate: list(c.keep_counts) for c, _ in results if c.rate in RATES}
    assert sorted(answers) == list(RATES)
    left = [rate for rate in RATES if answers[rate] == even[rate]]
    (line,) = caplog.messages
    assert f"{evaluations} evaluations" in line
    assert f"for {', '.join(f'{rate:.2f}' for rate in left)} (kept)" in line
    caplog.clear()
    enough = int(line.split()[-3])
    assert {c.rate for c, _ in search("cap", evaluations=enough)} == {*RATES, 1.0}
    assert not caplog.messages


def test_procedures_side_by_side_see_their_own_measurements():
    def count(start, steps):
        total = 0
        for step in range(steps):
            measurements = yield [Candidate(1.0, (start + step,)), Candidate(1.0, (start,))]
            total += sum(measurement.images for measurement in measurements)
        totals[start] = total

    totals = {}
    strategy = Procedure("both", lambda: together([count(10, 1), count(20, 3)]))
    while proposals := strategy.ask(3):
        results = measure_by_formula(proposals, lambda _: 1.0)
        strategy.tell(
            [(c, measurement_of(c.index, 1.0, 0.0, 0.0, c.keep_counts[0], 0.0)) for c, _ in results]
        )
    assert totals == {10: 20, 20: 20 + 20 + 21 + 20 + 22 + 20}
