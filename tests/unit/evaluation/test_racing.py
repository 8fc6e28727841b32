"""Racing: hits survive encoding, better networks are never stopped, estimates are fair."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cacp_ray.evaluation.measurement import Candidate
from cacp_ray.evaluation.racing import (
    decode_hits,
    encode_hits,
    estimate,
    has_fallen_behind,
    prefixes,
)
from cacp_ray.evaluation.scorer import Scorer
from tests.unit.evaluation.test_scorer import base, prepare  # noqa: F401 - a fixture


@given(st.lists(st.booleans(), min_size=1, max_size=300))
def test_hits_survive_the_way(bits):
    hits = np.array(bits)
    assert np.array_equal(decode_hits(encode_hits(hits)), hits)


def test_hits_of_five_thousand_images_are_small():
    hits = np.random.default_rng(0).random(5000) < 0.85
    assert len(encode_hits(hits)) < 600


def test_prefixes_rise_and_leave_a_rest():
    assert prefixes(5000) == [5000 * part // 16 for part in range(1, 16)]
    assert prefixes(3) == [1, 2]
    assert prefixes(1) == []


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.2))
def test_a_network_that_is_right_wherever_the_best_is_goes_on(seed, more):
    rng = np.random.default_rng(seed)
    best = rng.random(500) < 0.8
    assert not has_fallen_behind(best | (rng.random(500) < more), best)


def test_a_network_that_is_clearly_worse_stops():
    rng = np.random.default_rng(0)
    best = rng.random(625) < 0.85
    assert has_fallen_behind(best & (rng.random(625) > 0.05), best)
    assert has_fallen_behind(np.zeros(625, bool), np.ones(625, bool))


def test_the_estimate_is_exact_on_all_images_and_fair_on_few():
    rng = np.random.default_rng(0)
    best = rng.random(4000) < 0.85
    hits = np.where(rng.random(4000) < 0.1, rng.random(4000) < 0.5, best)
    assert estimate(hits, best) == pytest.approx(hits.mean())
    starts = [rng.permutation(4000) for _ in range(200)]
    estimates = [estimate(hits[order][:500], best[order]) for order in starts]
    alone = [hits[order][:500].mean() for order in starts]
    assert np.mean(estimates) == pytest.approx(hits.mean(), abs=0.002)
    assert np.std(estimates) < 0.8 * np.std(alone)


def test_a_bad_candidate_stops_and_a_good_one_is_scored_to_the_end(base):  # noqa: F811
    prepared = prepare(base, "none")
    score = Scorer(prepared, base.search, recovery="none", dtype="float32")
    whole = tuple(base.plan.cost_model.num_channels.tolist())
    first = score(Candidate(1.0, whole, index=0))
    assert first.score == pytest.approx(decode_hits(first.hits).mean())
    again = score(Candidate(1.0, whole, index=1, opponent=first.hits))
    assert (again.status, again.images, again.hits) == ("ok", 200, first.hits)
    bad = Candidate(0.3, tuple(count // 2 for count in whole), index=2)
    stopped = score(dataclasses.replace(bad, opponent=first.hits))
    assert (stopped.status, stopped.images, stopped.hits) == ("stopped", 12, "")
    assert abs(stopped.score - score(bad).score) < 0.25
    assert score(dataclasses.replace(bad, images=50)).hits == ""
    few = Scorer(prepared, base.search, recovery="none", dtype="float32", images=50)
    best = few(Candidate(1.0, whole, index=3)).hits
    assert len(decode_hits(best)) == 50
    assert few(dataclasses.replace(bad, opponent=best)).images < 50
